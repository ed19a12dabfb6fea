#!/usr/bin/env python3
"""Lighthouse Attention by its formulas, in float64 and in numpy, to check golden vectors and to make more of them.

    python3 tests/peers/lighthouse.py --check tests/golden   # what this gives against a folder's files
    python3 tests/peers/lighthouse.py --write tests/golden/peer

Needs numpy and safetensors. Written from the spec, whose sections the comments name, and not from the crate's code;
plain rather than fast. A folder holds `cases.toml` and a file per case (section 10). Selection is only as certain as
the order of the scores, which an implementation has in float32: a case is written only if every top-k cut is wider than
what rounding can reorder, and otherwise the next seed is tried. `--more` writes a wider set than the tests keep.
"""

import argparse
import pathlib
import sys
import tomllib

import numpy
import safetensors.numpy

# name, batch, tokens, heads, kv_heads, head_dim, levels, pooling, top_k, chunk, first seed, kept tokens (0: all)
KEPT = """
    gqa_n700     2  700 6 2  16 3 2   32   8 101 24
    mqa_d64      1 1501 4 1  64 3 4   32  16 102 24
    d128         1 3001 2 2 128 2 4   64  32 103 16
    l5           1 5003 4 2  32 5 2   32   8 104 24
    p8_few       1 2500 4 2  24 3 8   64  64 105 24
"""
MORE = """
    dense_gqa    2  301 6 3  24 1 2  128 128 201  0
    dense_mqa    1  513 3 1 128 1 4   16   8 202 40
    odd_d40      1  997 3 3  40 2 2   60  12 203  0
    gqa_d48      2 1003 8 2  48 3 2   64  16 204 60
    mqa_d80      1 1999 5 1  80 4 2   48  24 205 60
    mha_d96      1 1234 2 2  96 3 4   64  64 206  0
    gqa_d128     1 4099 8 2 128 4 4   32  16 207 40
    mqa_d128     2 2047 4 1 128 3 2  128 128 208 40
    gqa_d256     1  777 4 2 256 3 2   16   4 209 40
    l5_p2        2 3001 2 1  16 5 2   64  16 210 99
    l5_p4        1 5003 4 2  64 5 4   18   6 211 60
    l5_p8        1 9001 2 2  16 5 8    4   2 212 99
    l4_p8        1 7000 6 3  32 4 8   16   8 213 60
    l2_p8        1 5003 2 1  64 2 8  128  32 214 60
    chunk_of_2   1  700 4 4  16 3 2   40   2 215  0
    chunk_of_1   1  333 2 1  16 3 4   84   4 216  0
    uneven       1 1205 4 2  32 3 4   72   8 217  0
    few_tokens   3    5 4 2   8 3 4    8   8 218  0
    one_token    2    1 2 1  16 2 2    2   2 219  0
    all_taken    1  200 4 1  64 3 2  128 128 220  0
    paper_chunk  1 6000 2 1  64 3 4  256 128 221 60
    multiple     2 4096 4 4  64 3 4  256  64 222 40
    one_more     2 4097 4 1  64 3 4  256  64 223 40
"""
FIELDS = "batch tokens heads kv_heads head_dim levels pooling top_k chunk seed".split()
RESULTS = ["o", "dq", "dk", "dv"]
BOUND = 5e-6  # of float32 results, times a tensor's largest magnitude, at least 1
BLOCK = 512  # rows of attention at a time


def fail(message):
    sys.exit(f"lighthouse.py: {message}")


def uniform(seed, tensor, shape):
    """Section 10: element i of input tensor 0=q, 1=k, 2=v, 3=do. Every value is exact in float32."""
    with numpy.errstate(over="ignore"):  # 64-bit wrapping arithmetic
        x = numpy.uint64((seed * 4 + tensor) << 32) + numpy.arange(numpy.prod(shape), dtype=numpy.uint64)
        z = x + numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> numpy.uint64(30)) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> numpy.uint64(27)) * numpy.uint64(0x94D049BB133111EB)
        z = z ^ z >> numpy.uint64(31)
    return ((z >> numpy.uint64(40)).astype(numpy.float64) / 2**24 * 2 - 1).reshape(shape)


class Case:
    """One case's parameters and sizes (sections 1 and 9)."""

    def __init__(self, **parameters):
        self.chunk = 128
        vars(self).update(parameters)
        self.windows = [self.pooling**level for level in range(self.levels)]
        coarsest = self.windows[-1]
        self.padded = -(-self.tokens // coarsest) * coarsest
        self.sizes = [self.padded // window for window in self.windows]
        self.starts = [sum(self.sizes[:level]) for level in range(self.levels)]  # of the flat index

    def windows_of(self, x, level):
        """[N, ...] as [entries, window, ...], with zero tokens appended (section 9)."""
        padded = numpy.concatenate([x, numpy.zeros((self.padded - self.tokens, *x.shape[1:]))])
        return padded.reshape(self.sizes[level], self.windows[level], *x.shape[1:])


def top(candidates, scores, count, gaps):
    """The `count` candidates of the highest scores; the lower index wins a tie. Notes the gap at the cut."""
    order = sorted(candidates, key=lambda i: (-scores[i], i))
    if 0 < count < len(order):
        least, next_ = scores[order[count - 1]], scores[order[count]]
        if least > 0:  # two windows without real tokens tie exactly, in any precision
            gaps.append((least - next_) / least)
    return order[:count], sorted(order[count:])


def select(case, q, k, gaps):
    """Sections 3 to 5 for one head's q and k [N, D]: the sub-sequence as a list of (level, i)."""
    if case.levels == 1:
        return [(0, i) for i in range(case.tokens)]
    # Section 3: the largest squared norm of an entry's tokens.
    score_q, score_k = (
        [case.windows_of((x * x).sum(1), level).max(1) for level in range(case.levels)] for x in (q, k)
    )
    # Section 4.
    n, chunks, m = case.sizes[-1], case.top_k // case.chunk, case.chunk
    entries, expanded = [], set()
    for c in range(chunks):
        candidates = range(c * n // chunks, (c + 1) * n // chunks)
        entries += [(case.levels - 1, i) for i in candidates]
        for level in range(case.levels - 1, 0, -1):
            selected = list(candidates)
            if len(selected) > m:
                by_query, rest = top(selected, score_q[level], m // 2, gaps)
                by_key, _ = top(rest, score_k[level], m // 2, gaps)
                selected = sorted(by_query + by_key)
            expanded.update((level, i) for i in selected)
            candidates = [i * case.pooling + child for i in selected for child in range(case.pooling)]
            entries += [(level - 1, i) for i in candidates]
    # Section 5: leaves by start tile [0, N), so by end too, and an expanded entry has the end of its last leaf.
    entries.sort(key=lambda entry: ((entry[1] + 1) * case.windows[entry[0]], entry[0]))
    ends = [0] + [(i + 1) * case.windows[level] for level, i in entries if (level, i) not in expanded]
    starts = [i * case.windows[level] for level, i in entries if (level, i) not in expanded]
    assert starts == ends[:-1] and ends[-1] == case.padded, "leaves tile [0, N)"
    return entries


def attention(q, k, v, d_o):
    """Section 6 and its backward (section 8) for [S, D] blocks."""
    scale = 1 / numpy.sqrt(q.shape[1])
    o, dq, dk, dv = (numpy.zeros_like(x) for x in (q, q, k, v))
    for begin in range(0, len(q), BLOCK):
        rows = slice(begin, min(begin + BLOCK, len(q)))
        seen = slice(0, rows.stop)
        x = q[rows] @ k[seen].T * scale
        x[numpy.arange(rows.stop) > numpy.arange(rows.start, rows.stop)[:, None]] = -numpy.inf
        p = numpy.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        o[rows] = p @ v[seen]
        dv[seen] += p.T @ d_o[rows]
        dp = d_o[rows] @ v[seen].T
        dx = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
        dq[rows] = dx @ k[seen]
        dk[seen] += dx.T @ q[rows]
    return o, dq, dk, dv


def head(case, q, k, v, d_o, entries):
    """Sections 2 and 6 to 8 for one head's [N, D]: o, dq, dk, dv [N, D]."""
    pyramids = [[case.windows_of(x, level).mean(1) for level in range(case.levels)] for x in (q, k, v)]
    rows = [numpy.stack([pyramid[level][i] for level, i in entries]) for pyramid in pyramids]
    # Section 7: the tokens that entry (l, i) adds to; section 8: those whose gradients it sums.
    targets = []
    for level, i in entries:
        window = case.windows[level]
        targets.append(slice(i * window + window - 1, min(i * window + 2 * window - 1, case.tokens)))
    d_rows = numpy.stack([d_o[target].sum(0) for target in targets])
    o_rows, *gradient_rows = attention(*rows, d_rows)
    o, *gradients = (numpy.zeros_like(x) for x in (q, q, k, v))
    for s, (level, i) in enumerate(entries):
        window = case.windows[level]
        o[targets[s]] += o_rows[s]
        for gradient, of_rows in zip(gradients, gradient_rows):
            gradient[i * window : (i + 1) * window] += of_rows[s] / window
    return o, *gradients


def compute(case, search=False):
    """All tensors of a case, and the smallest gap at a cut over what float32 can reorder.

    With `search`, the case's seed moves on to the first one whose cuts are all certain.
    """
    queries = (case.batch, case.tokens, case.heads, case.head_dim)
    keys = (case.batch, case.tokens, case.kv_heads, case.head_dim)
    heads = [(b, h, h // (case.heads // case.kv_heads)) for b in range(case.batch) for h in range(case.heads)]
    # A sum of D squares errs by at most D roundings in any order, its root by one more; a root halves a gap.
    needed = 2 * (case.head_dim + 2) * 2.0**-24
    while True:
        q, k, v, d_o = (uniform(case.seed, t, shape) for t, shape in enumerate([queries, keys, keys, queries]))
        gaps = []
        entries = [select(case, q[b, :, h], k[b, :, kv], gaps) for b, h, kv in heads]
        gap = min(gaps, default=1.0) / needed
        if gap > 1 or not search:
            break
        case.seed += 1
    o, dq, dk, dv = (numpy.zeros(shape) for shape in (queries, queries, keys, keys))
    for (b, h, kv), of_head in zip(heads, entries):
        results = head(case, q[b, :, h], k[b, :, kv], v[b, :, kv], d_o[b, :, h], of_head)
        o[b, :, h], dq[b, :, h] = results[:2]
        dk[b, :, kv] += results[2]  # section 8: summed over the group
        dv[b, :, kv] += results[3]
    flat = [[case.starts[level] + i for level, i in of_head] for of_head in entries]
    indices = numpy.array(flat, numpy.int32).reshape(case.batch, case.heads, -1)
    return {"indices": indices, "o": o, "dq": dq, "dk": dk, "dv": dv}, gap


def check(folder):
    """Whether all files of a folder hold what is computed here."""
    good = True
    for parameters in tomllib.loads((folder / "cases.toml").read_text())["case"]:
        case = Case(**parameters)
        stored = safetensors.numpy.load_file(folder / case.file)
        got, gap = compute(case)
        wrong = 0
        if case.levels > 1 or "indices" in stored:
            wrong = numpy.count_nonzero(stored["indices"] != got["indices"])
        worst = 0.0
        for name in RESULTS:
            values = got[name][:, stored["rows"]] if "rows" in stored else got[name]
            assert stored[name].shape == values.shape, f"{case.file}: {name} has shape {stored[name].shape}"
            largest = max(1.0, numpy.abs(stored[name]).max())
            # A NaN stays one, and fails.
            worst = numpy.maximum(worst, numpy.abs(stored[name] - values).max() / largest)
        passed = wrong == 0 and worst <= BOUND
        good = good and passed
        print(
            f"{'pass' if passed else 'FAIL'} {case.file}: {wrong} of {got['indices'].size} indices differ,"
            f" results by {worst:.1e} of {BOUND:.0e}; smallest gap {gap:.1f} times float32's"
        )
    return good


def kept_tokens(case, count):
    """Tokens whose results a file keeps: both ends, around the coarsest window, and some of the rest."""
    window = case.windows[-1]
    edges = [0, window - 2, window - 1, window, case.tokens - window, case.tokens - 1]
    spread = numpy.linspace(1, case.tokens - 2, count - len(edges)).round().astype(int)
    return numpy.unique(numpy.clip([*edges, *spread], 0, case.tokens - 1)).astype(numpy.int32)


def write(folder, table):
    folder.mkdir(parents=True, exist_ok=True)
    text = "# Made by tests/peers/lighthouse.py --write, in float64 from the spec, not by published code.\n"
    for line in table.strip().splitlines():
        name, *numbers, count = line.split()
        case = Case(**dict(zip(FIELDS, map(int, numbers))))
        tensors, gap = compute(case, search=True)
        for result in RESULTS:
            tensors[result] = tensors[result].astype(numpy.float32)
        if int(count):
            rows = kept_tokens(case, int(count))
            tensors["rows"] = rows
            tensors |= {result: numpy.ascontiguousarray(tensors[result][:, rows]) for result in RESULTS}
        file = f"{name}.safetensors"
        safetensors.numpy.save_file(tensors, folder / file)
        text += f'\n[[case]]\nfile = "{file}"\n' + "".join(f"{field} = {getattr(case, field)}\n" for field in FIELDS)
        print(f"{file}: seed {case.seed}, S = {tensors['indices'].shape[2]}, smallest gap {gap:.1f} times float32's")
    (folder / "cases.toml").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", metavar="DIR", type=pathlib.Path, help="compare with a folder's files")
    action.add_argument("--write", metavar="DIR", type=pathlib.Path, help="write the cases that the tests keep")
    parser.add_argument("--more", action="store_true", help="write a wider set of cases")
    arguments = parser.parse_args()
    # Section 10's own check of the inputs.
    begin = uniform(1, 0, (1, 1024, 1, 8)).ravel()[:4].astype(numpy.float32)
    assert (begin == numpy.array([0.13780701, -0.14386487, -0.7751771, -0.1651876], numpy.float32)).all(), begin
    if arguments.check and not check(arguments.check):
        fail(f"{arguments.check} does not hold")
    if arguments.write:
        write(arguments.write, MORE if arguments.more else KEPT)


if __name__ == "__main__":
    main()

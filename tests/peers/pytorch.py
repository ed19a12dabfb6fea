#!/usr/bin/env python3
"""Measures PyTorch's attention and matrix product on this machine's CUDA card, for `bench --baseline`.

    python3 tests/peers/pytorch.py --json pytorch.json
    cargo run --release --example bench -- all --baseline pytorch.json

Rows: `copy` (device to device), `cublas` (f16 GEMM 8192^3), exact causal attention on [B, H, N, D] in f16 with
scaled_dot_product_attention, `flash2` (its FLASH_ATTENTION backend, FlashAttention-2) and `cudnn`, and the operators of a training
step as eager PyTorch has them, `torch` and the operator's name (the bench's `operators`). Times are medians of warm
runs between CUDA events, on random data; all runs of a row below 5 ms are queued before the first is waited for, so that
the host's launches do not show.

The JSON is what the bench writes with --json (examples/bench/report.rs):

    {"device": "card, driver, software", "rows": [{
        "name": "flash2", "pass": "forward", "element": "f16",
        "shape": {"tokens": 18432, "heads": 8, "head_dim": 128},
        "median_ms": 1.25, "low_ms": 1.24, "high_ms": 1.27, "runs": 30, "clock": "gpu",
        "bytes": null, "flops": 695784701952, "floor_ms": null
    }]}

An operator's backward is timed over a graph that its forward left; what it gives beyond the gradients (y of SwiGLU) is not.

`low_ms` and `high_ms` are the 10th and 90th percentile. `pass` is `forward`, `forward+backward` or empty. Operations are
counted as the field does: 2 N^2 H D forward, 7 N^2 H D forward + backward. A bench row's peers are those of equal `pass`
and `element` whose `shape` agrees in all that it has.
"""

import argparse
import json
import subprocess
import sys
import time

# The bench's sub-sequences and dense layers.
TOKENS = [4096, 18432, 32768, 98304, 131072]
# One forward + backward takes longer than is worth waiting for beyond these.
MOST_TOKENS = {"flash2": 98304, "cudnn": 131072}
FORWARD, BOTH = "forward", "forward+backward"
GROUPS = ["attention", "operators"]
# The model of the bench's step on a discrete GPU (examples/bench/groups/step.rs), and the parameters of its optimizer row.
MODEL = {"tokens": 98304, "width": 1024, "heads": 8, "hidden": 1536, "vocab": 256, "parameters": 1 << 26}


def fail(message):
    sys.exit(f"pytorch.py: {' '.join(str(message).split())}")


def numbers(text):
    """Parses `N,N..`."""
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers such as 4096,18432")
    return values


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="The module's text describes rows and schema."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="attention or operators [default: both]")
    parser.add_argument("--json", metavar="FILE", help="write the rows for `bench --baseline`")
    parser.add_argument(
        "--tokens", type=numbers, metavar="N,N..", help=f"attention's lengths [default: {','.join(map(str, TOKENS))}]"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences of attention [default: 1]")
    parser.add_argument("--heads", type=int, default=8, help="[default: 8]")
    parser.add_argument("--kv-heads", type=int, help="of attention [default: as many as heads]")
    parser.add_argument("--head-dim", type=numbers, default=[128], metavar="D,D..", help="of attention [default: 128]")
    parser.add_argument("--warmup", type=float, default=2.5, metavar="SECONDS", help="before the first row [default: 2.5]")
    args = parser.parse_args()
    if args.heads < 1 or args.batch < 1 or not 0 <= args.warmup <= 3600:
        fail("--heads and --batch must be positive, --warmup from 0 to 3600")
    args.kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    if args.kv_heads < 1 or args.heads % args.kv_heads:
        fail(f"--kv-heads {args.kv_heads} must divide the {args.heads} heads")
    for group in args.groups:
        if group not in GROUPS:
            fail(f"unknown group {group!r}: there are {', '.join(GROUPS)}")
    args.groups = args.groups or GROUPS
    return args


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def quantile(values, at):
    """A quantile of sorted values, interpolated."""
    place = at * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def significant(x):
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


class Peers:
    """The rows measured so far."""

    def __init__(self, torch):
        self.torch = torch
        self.rows = []
        self.last = time.monotonic()

    def events(self, run, count):
        """Milliseconds of `count` runs, queued one after the other."""
        pairs = []
        for _ in range(count):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        self.torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def warm(self, run, seconds):
        """Runs until the time is over, and gives the milliseconds of a warm run."""
        self.events(run, 1)  # The first one of a shape builds plans, which can take longer than the time given.
        start = time.monotonic()
        if start - self.last > 1:
            seconds *= 4  # A card that was idle has to raise its clocks again.
        while True:
            last = self.events(run, 1)[0]
            if time.monotonic() - start >= seconds:
                return last

    def measure(self, name, run, pass_="", element="f16", shape=None, moved=None, flops=None):
        """Adds a row of 5 to 30 runs in about a second, 3 where one takes as long as that."""
        one = self.warm(run, 0.3)
        count = 3 if one > 1000 else max(5, min(30, round(1000 / one)))
        # Long ones one by one, as the bench has them: a card without pauses reaches its power limit sooner.
        at_once = count if one < 5 else 1
        times = sorted(ms for _ in range(count // at_once) for ms in self.events(run, at_once))
        self.last = time.monotonic()
        row = {
            "name": name,
            "pass": pass_,
            "element": element,
            "shape": shape or {},
            "median_ms": quantile(times, 0.5),
            "low_ms": quantile(times, 0.1),
            "high_ms": quantile(times, 0.9),
            "runs": count,
            "clock": "gpu",
            "bytes": moved,
            "flops": flops,
            "floor_ms": None,
        }
        self.rows.append(row)
        median = row["median_ms"]
        rate = f"{flops / median * 1e-9:8.1f} TFLOP/s" if flops else f"{moved / median * 1e-6:8.1f} GB/s"
        spread = 100 * (row["high_ms"] - row["low_ms"]) / median
        size = " ".join(f"{key} {value}" for key, value in row["shape"].items())
        print(f"{name:32} {pass_:17} {size:40} {significant(median):>8} ms {spread:5.1f}% {count:3} runs {rate}", flush=True)

    def skip(self, name, pass_, tokens, reason):
        words = " ".join(str(reason).split())
        print(f"{name:32} {pass_:17} tokens {tokens:<33} not measured: {words[:200]}", flush=True)


def measure_copy(peers):
    torch = peers.torch
    size = 1 << 30
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    peers.measure("copy", lambda: target.copy_(source), element="u32", shape={"bytes": size}, moved=2 * size)


def product(torch, size):
    """One f16 matrix product, ready to run."""
    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)


def measure_attention(peers, name, backend, tokens, head_dim, args):
    """Forward, then forward + backward, of causal attention on [B, H, N, D], k and v with KV heads."""
    torch = peers.torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, kv_heads = args.batch, args.heads, args.kv_heads
    data = [(batch, h, tokens, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_o = (torch.randn(size, dtype=torch.float16, device="cuda") for size in data)
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim}
    # Rows name them where they are not what they usually are.
    shape |= {"batch": batch} if batch != 1 else {}
    shape |= {"kv_heads": kv_heads} if kv_heads != heads else {}
    work = tokens * tokens * batch * heads * head_dim

    def attention():
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != heads)

    def forward():
        with torch.no_grad():
            attention()

    def both():
        o = attention()
        torch.autograd.grad(o, (q, k, v), d_o)

    with sdpa_kernel(backend):
        peers.measure(name, forward, FORWARD, shape=shape, flops=2 * work)
        for tensor in (q, k, v):
            tensor.requires_grad_()
        peers.measure(name, both, BOTH, shape=shape, flops=7 * work)


def operators(torch, model, device="cuda"):
    """Yields name, sizes, bytes, operations and a run of each operator."""
    from torch.nn import functional

    rows, width, heads, hidden, vocab = (model[name] for name in ("tokens", "width", "heads", "hidden", "vocab"))
    head_dim, outputs = width // heads, 3 * width

    def data(*shape):
        return torch.randn(shape, dtype=torch.float16, device=device)

    def activations(columns=width):
        return {"rows": rows, "width": columns}

    def size(m, n, k):
        return {"m": m, "n": n, "k": k}

    def without_graph(run):
        def inner():
            with torch.no_grad():
                run()

        return inner

    def backward(y, inputs, d_y):
        return lambda: torch.autograd.grad(y, inputs, d_y, retain_graph=True)

    # Bytes of least traffic in f16, and operations, as in examples/bench/groups/operators.rs (but
    # that the weight gradient here is f16).
    def moved(elements, words=0):
        return 2 * elements + 4 * words

    x, d_x = data(rows, width), data(rows, width)
    ids = torch.arange(rows, device=device).mul_(2654435761).bitwise_right_shift_(7).remainder_(vocab)
    table = data(vocab, width).requires_grad_()
    yield "embedding", activations(), moved(rows * width, rows), None, without_graph(lambda: functional.embedding(ids, table))
    run = backward(functional.embedding(ids, table), table, d_x)
    yield "embedding_backward", activations(), moved(rows * width, rows), None, run
    logits = data(rows, vocab).requires_grad_()

    def cross_entropy():
        torch.autograd.grad(functional.cross_entropy(logits, ids), logits)

    yield "cross_entropy_backward", activations(vocab), moved(2 * rows * vocab, rows), None, cross_entropy

    weight, leaf = data(width).requires_grad_(), x.clone().requires_grad_()
    d_residual = data(rows, width)

    def norm(x):
        return functional.rms_norm(x, (width,), weight)

    normed = norm(leaf)
    yield "rms_norm", activations(), moved(2 * rows * width, rows), None, without_graph(lambda: norm(x))
    run = backward(normed, (leaf, weight), d_x)
    yield "rms_norm_backward", activations(), moved(3 * rows * width, rows), None, run

    def with_residual():
        d_leaf, _ = torch.autograd.grad(normed, (leaf, weight), d_x, retain_graph=True)
        d_leaf.add_(d_residual)

    yield "rms_norm_backward_residual", activations(), moved(4 * rows * width, rows), None, with_residual
    del normed, leaf, d_residual, logits

    angle = torch.outer(torch.arange(rows), 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1)[:-1])
    cosine, sine = (part.to(device, torch.float16)[:, None] for part in (angle.cos(), angle.sin()))

    def rotated(qkv):
        q, k, v = qkv.view(rows, 3, heads, head_dim).unbind(1)

        def turn(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)

        return turn(q), turn(k), v

    wqkv, d_qkv = data(outputs, width), data(rows, outputs)
    products = 2 * rows * width

    def product(m, n, k, epilogue=0):
        return moved(m * k + n * k + m * n + epilogue)

    run = without_graph(lambda: rotated(x @ wqkv.T))
    yield "qkv", size(rows, outputs, width), product(rows, outputs, width), products * outputs, run
    leaf = data(rows, outputs).requires_grad_()
    d_heads = tuple(data(rows, heads, head_dim) for _ in range(3))
    run = backward(rotated(leaf), leaf, d_heads)
    yield "qkv_backward", activations(outputs), moved(2 * rows * outputs, rows * head_dim), None, run
    del leaf, d_heads
    run = without_graph(lambda: d_qkv @ wqkv)
    yield "linear_backward_input", size(rows, width, outputs), product(rows, width, outputs), products * outputs, run
    run = without_graph(lambda: d_qkv.T @ x)
    yield "linear_backward_weight", size(outputs, width, rows), product(outputs, width, rows), products * outputs, run
    wo, residual = data(width, width), data(rows, width)
    run = without_graph(lambda: x @ wo.T)
    yield "linear", size(rows, width, width), product(rows, width, width), products * width, run
    run = without_graph(lambda: torch.addmm(residual, x, wo.T))
    moved_bytes = product(rows, width, width, rows * width)
    yield "linear_residual", size(rows, width, width), moved_bytes, products * width, run
    del d_qkv, residual

    gate_up_weight, down = data(2 * hidden, width), data(width, hidden)

    def activated(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    run = without_graph(lambda: activated(x @ gate_up_weight.T))
    moved_bytes = product(rows, 2 * hidden, width, rows * hidden)
    yield "swiglu", size(rows, 2 * hidden, width), moved_bytes, 2 * products * hidden, run
    leaf = data(rows, 2 * hidden).requires_grad_()
    y = activated(leaf)

    def swiglu_backward():
        torch.autograd.grad(y, leaf, d_x @ down, retain_graph=True)

    moved_bytes = product(rows, hidden, width, 4 * rows * hidden)
    yield "swiglu_backward", size(rows, hidden, width), moved_bytes, products * hidden, swiglu_backward
    del leaf, y

    count = model["parameters"]
    master = torch.zeros(count, device=device, requires_grad=True)
    master.grad = torch.randn(count, device=device)
    run = without_graph(lambda: torch.linalg.vector_norm(master.grad))
    yield "grad_norm", {"parameters": count}, moved(0, count), None, run
    optimizer = torch.optim.AdamW([master], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    weights = torch.empty(count, dtype=torch.float16, device=device)

    def step():
        optimizer.step()
        weights.copy_(master)

    yield "adamw", {"parameters": count}, moved(count, 7 * count), None, without_graph(step)


def main():
    args = arguments()
    try:
        import torch
        from torch.nn.attention import SDPBackend
    except ImportError as error:
        fail(f"needs PyTorch 2.5 or later with CUDA (pip install torch): {error}")
    if not torch.cuda.is_available():
        fail("PyTorch sees no CUDA card: these peers exist on NVIDIA cards only")
    backends = {"flash2": SDPBackend.FLASH_ATTENTION, "cudnn": getattr(SDPBackend, "CUDNN_ATTENTION", None)}
    try:
        output = open(args.json, "w", encoding="utf-8") if args.json else None
    except OSError as error:
        fail(error)

    device = ", ".join([
        torch.cuda.get_device_name(),
        f"driver {driver()}",
        f"PyTorch {torch.__version__}",
        f"CUDA {torch.version.cuda}",
        f"cuDNN {torch.backends.cudnn.version()}",
    ])
    print(device, flush=True)
    torch.manual_seed(1)
    peers = Peers(torch)
    size = 8192
    multiply = product(torch, size)
    peers.warm(multiply, args.warmup)
    peers.measure("cublas", multiply, shape={"m": size, "n": size, "k": size}, flops=2 * size**3)
    del multiply
    measure_copy(peers)
    attention = [
        (name, backend, head_dim, tokens)
        for name, backend in backends.items()
        for head_dim in args.head_dim
        for tokens in args.tokens or [n for n in TOKENS if n <= MOST_TOKENS[name]]
    ]
    if "attention" in args.groups:
        for name, backend, head_dim, tokens in attention:
            measured = len(peers.rows)
            try:
                if backend is None:
                    raise RuntimeError("this PyTorch has no such backend")
                measure_attention(peers, name, backend, tokens, head_dim, args)
            except RuntimeError as error:
                # A backend that refuses the shape, or too little memory.
                peers.skip(name, FORWARD if len(peers.rows) == measured else BOTH, tokens, error)
            torch.cuda.empty_cache()
    if "operators" in args.groups:
        try:
            for name, shape, moved, flops, run in operators(torch, MODEL):
                peers.measure(f"torch {name}", run, shape=shape, moved=moved, flops=flops)
        except (AttributeError, RuntimeError) as error:
            # An older PyTorch, or too little memory: what was measured is kept.
            peers.skip("torch", "", MODEL["tokens"], error)
    if output:
        with output:
            json.dump({"device": device, "rows": peers.rows}, output, indent=2)
            output.write("\n")


if __name__ == "__main__":
    main()

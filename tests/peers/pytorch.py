#!/usr/bin/env python3
"""Measures PyTorch's attention and matrix product on this machine's CUDA card, for `bench --baseline`.

    python3 tests/peers/pytorch.py --json pytorch.json
    cargo run --release --example bench -- all --baseline pytorch.json

Rows: `copy` (device to device), `cublas` (f16 GEMM 8192^3), and exact causal attention on [1, H, N, D] in f16 with
scaled_dot_product_attention, `flash2` (its FLASH_ATTENTION backend, FlashAttention-2) and `cudnn`. Times are medians of warm
runs between CUDA events, on random data; all runs of a row are queued before the first is waited for, so that the host's
launches do not show.

The JSON is what the bench writes with --json (examples/bench/report.rs):

    {"device": "card, driver, software", "rows": [{
        "name": "flash2", "pass": "forward", "element": "f16",
        "shape": {"tokens": 18432, "heads": 8, "head_dim": 128},
        "median_ms": 1.25, "low_ms": 1.24, "high_ms": 1.27, "runs": 30, "clock": "gpu",
        "bytes": null, "flops": 695784701952, "floor_ms": null
    }]}

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
    parser.add_argument("--json", metavar="FILE", help="write the rows for `bench --baseline`")
    parser.add_argument(
        "--tokens", type=numbers, metavar="N,N..", help=f"attention's lengths [default: {','.join(map(str, TOKENS))}]"
    )
    parser.add_argument("--heads", type=int, default=8, help="[default: 8]")
    parser.add_argument("--head-dim", type=int, default=128, help="[default: 128]")
    parser.add_argument("--warmup", type=float, default=2.5, metavar="SECONDS", help="before the first row [default: 2.5]")
    args = parser.parse_args()
    if args.heads < 1 or args.head_dim < 1 or not 0 <= args.warmup <= 3600:
        fail("--heads and --head-dim must be positive, --warmup from 0 to 3600")
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
        while True:
            last = self.events(run, 1)[0]
            if time.monotonic() - start >= seconds:
                return last

    def measure(self, name, run, pass_="", element="f16", shape=None, moved=None, flops=None):
        """Adds a row of 5 to 30 runs in about 0.3 s, 3 where one takes as long as that."""
        one = self.warm(run, 0.3)
        count = 3 if one > 300 else max(5, min(30, round(300 / one)))
        times = sorted(self.events(run, count))
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
        print(f"{name:8} {pass_:17} {size:40} {significant(median):>8} ms {spread:5.1f}% {count:3} runs {rate}", flush=True)

    def skip(self, name, pass_, tokens, reason):
        words = " ".join(str(reason).split())
        print(f"{name:8} {pass_:17} tokens {tokens:<33} not measured: {words[:200]}", flush=True)


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


def measure_attention(peers, name, backend, tokens, heads, head_dim):
    """Forward, then forward + backward, of causal attention on [1, H, N, D]."""
    torch = peers.torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    size = (1, heads, tokens, head_dim)
    q, k, v, d_o = (torch.randn(size, dtype=torch.float16, device="cuda") for _ in range(4))
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim}
    work = tokens * tokens * heads * head_dim

    def forward():
        with torch.no_grad():
            scaled_dot_product_attention(q, k, v, is_causal=True)

    def both():
        o = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(o, (q, k, v), d_o)

    with sdpa_kernel(backend):
        peers.measure(name, forward, FORWARD, shape=shape, flops=2 * work)
        for tensor in (q, k, v):
            tensor.requires_grad_()
        peers.measure(name, both, BOTH, shape=shape, flops=7 * work)


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
    for name, backend in backends.items():
        for tokens in args.tokens or [n for n in TOKENS if n <= MOST_TOKENS[name]]:
            measured = len(peers.rows)
            try:
                if backend is None:
                    raise RuntimeError("this PyTorch has no such backend")
                measure_attention(peers, name, backend, tokens, args.heads, args.head_dim)
            except RuntimeError as error:
                # A backend that refuses the shape, or too little memory.
                peers.skip(name, FORWARD if len(peers.rows) == measured else BOTH, tokens, error)
            torch.cuda.empty_cache()
    if output:
        with output:
            json.dump({"device": device, "rows": peers.rows}, output, indent=2)
            output.write("\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Reads what NVIDIA's driver made of kernels: the hot loop's instructions, and what in it waits for loads from storage.

    cargo run --release --example bench -- attention --tokens 18432 --head-dim 64 --pipelines pipelines
    pip install zstandard nvidia-cuda-nvdisasm
    python3 tests/tools/nvidia_code.py pipelines/*

Arguments are wgpu's pipeline caches of a Vulkan device. For each pipeline in them, in no order and without names (the
products and exponentials tell):

- registers, bytes of code, and the loads and stores of spilled registers, within the hot loop and in all. The hot loop is
  the innermost one with most matrix products. A path through it takes no branch that skips less than 20 instructions, and
  skips what a branch skips that is longer: the rare cases.
- a loop's instructions by kind, and the clocks for which it has the unit of workgroup memory and L1, and the matrix
  units, of eight subgroups on a multiprocessor (costs as in BENCHMARKS.md; bank conflicts do not show here).
- for each load from storage, after how many instructions, and products among them, something waits for its scoreboard,
  and after how many its result is used. Where the first is much less than the second, a wait is for another load.

What is read is not documented by NVIDIA: the block `NVuc` of a cache entry as driver 580 writes it for compute
capability 9.0. BENCHMARKS.md has the layout and what was learnt.
"""

import collections
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import typing

FRAME = b"\x28\xb5\x2f\xfd"
RARE = 20
SUBGROUPS = 8
SCHEDULERS = 4
# Clocks for a subgroup's instruction: of the unit that has workgroup memory and L1, and of a scheduler's matrix unit.
WIDTHS = {".128": 4.0, ".64": 2.0}
MATRIX_LOAD, MATRIX_PRODUCT = 4.5, 6.6


def fail(message):
    sys.exit(f"nvidia_code.py: {message}")


class Instruction(typing.NamedTuple):
    address: int
    text: str
    written: int  # the scoreboard that is raised when the result is there, 7 for none
    waits: int  # a bit for each scoreboard

    def kind(self):
        return re.match(r"(?:@!?U?P\w+\s+)?(\S+)", self.text).group(1)

    def target(self):
        """Where a branch goes."""
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found.group(1), 16) if found else None


class Code(typing.NamedTuple):
    registers: int
    length: int
    instructions: list


def codes(cache):
    """The code of each pipeline in a cache."""
    try:
        import zstandard
    except ImportError:
        fail("needs zstandard: pip install zstandard nvidia-cuda-nvdisasm")
    at = cache.find(FRAME)
    while at >= 0:
        try:
            entry = zstandard.ZstdDecompressor().decompressobj().decompress(cache[at:])
        except zstandard.ZstdError:
            entry = b""
        block = entry.find(b"NVuc")
        if block >= 0:
            length, start = struct.unpack_from("<II", entry, block + 0x44)
            (registers,) = struct.unpack_from("<I", entry, block + 0x160)
            yield Code(registers, length, disassemble(entry[block + start : block + start + length]))
        at = cache.find(FRAME, at + 1)


def disassembler():
    try:
        import nvidia.cu13 as package
    except ImportError:
        return "nvdisasm"
    return str(pathlib.Path(next(iter(package.__path__))) / "bin" / "nvdisasm")


def disassemble(code):
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        try:
            run = subprocess.run([disassembler(), "-b", "SM90", file.name], capture_output=True, text=True, check=False)
        except OSError as error:
            fail(f"needs nvdisasm: pip install nvidia-cuda-nvdisasm ({error})")
    if run.returncode != 0:
        fail(f"nvdisasm: {run.stderr.strip()}")
    instructions = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", run.stdout):
        address = int(address, 16)
        control = int.from_bytes(code[address : address + 16], "little") >> 105
        instructions.append(Instruction(address, text, control >> 5 & 7, control >> 11 & 63))
    return instructions


def products(instructions):
    return sum("HMMA" in i.text for i in instructions)


def hot_loop(instructions):
    """The range of the innermost loop with most products, or of the longest innermost loop."""
    index = {i.address: n for n, i in enumerate(instructions)}
    loops = [(index[i.target()], n) for n, i in enumerate(instructions) if i.target() in index and index[i.target()] < n]
    # A loop in a rare branch, of few instructions, does not make the one around it an outer loop.
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= f and l <= last and (f, l) != (first, last) and l - f >= 100 for f, l in loops)
    ]
    return max(inner, key=lambda r: (products(instructions[r[0] : r[1]]), r[1] - r[0]), default=None)


def common_path(instructions, first, last):
    index = {i.address: n for n, i in enumerate(instructions)}
    path, at, seen = [], first, set()
    while at <= last and at not in seen:
        seen.add(at)
        path.append(instructions[at])
        target = index.get(instructions[at].target())
        forward = target is not None and at < target <= last  # further on it leaves the loop
        at = target if forward and (not instructions[at].text.startswith("@") or target - at > RARE) else at + 1
    return path


def wide(kind):
    return next((clocks for width, clocks in WIDTHS.items() if width in kind), 1.0)


def memory_clocks(kind):
    if kind.startswith("LDSM"):
        return MATRIX_LOAD
    return wide(kind) if re.match(r"(LDS|STS|LDG|STG)\b", kind) else 0.0


def registers_of(load):
    first = int(re.search(r"R(\d+)", load.text).group(1))
    return range(first, first + int(wide(load.kind())))


def after(path, start, found):
    """How many instructions after one, round the loop, something is found, and how many products are among them."""
    around = path[start + 1 :] + path[: start + 1]
    at = next((n for n, instruction in enumerate(around) if found(instruction)), None)
    return "never" if at is None else f"{at + 1} ({products(around[:at])} products)"


def report(code):
    print(f"\n{code.registers} registers, {code.length} bytes of code")
    loop = hot_loop(code.instructions)
    if loop is None:
        print("  no loop")
        return
    first, last = loop
    spills = [n for n, i in enumerate(code.instructions) if re.match(r"(LDL|STL)\b", i.kind())]
    within = sum(first <= n <= last for n in spills)
    path = common_path(code.instructions, first, last)
    begin, end = code.instructions[first].address, code.instructions[last].address
    print(f"  loop {begin:x} to {end:x}: {len(path)} instructions; spilled registers {within} times of {len(spills)}")
    kinds = collections.Counter(i.kind() for i in path)
    shown = {kind: n for kind, n in kinds.items() if memory_clocks(kind) or re.match(r"HMMA|MUFU|BAR|LDL|STL", kind)}
    print("  " + ", ".join(f"{kind} {n}" for kind, n in sorted(shown.items())))
    memory = SUBGROUPS * sum(memory_clocks(i.kind()) for i in path)
    matrices = SUBGROUPS / SCHEDULERS * MATRIX_PRODUCT * products(path)
    print(f"  of eight subgroups {memory:.0f} clocks of workgroup memory and L1, {matrices:.0f} of the matrix units")
    for n, load in enumerate(path):
        if not load.kind().startswith("LDG"):
            continue
        held = registers_of(load)
        waited = after(path, n, lambda i: i.waits >> load.written & 1)
        used = after(path, n, lambda i: any(int(r) in held for r in re.findall(r"\bR(\d+)", i.text)))
        print(f"  {load.address:x} {load.kind()} of scoreboard {load.written}: waited for after {waited}, used after {used}")


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if "--help" in sys.argv or "-h" in sys.argv else 2)
    for name in sys.argv[1:]:
        try:
            cache = pathlib.Path(name).read_bytes()
        except OSError as error:
            fail(error)
        found = list(codes(cache))
        if not found:
            fail(f"{name} has no code of an NVIDIA GPU")
        print(f"{name}: {len(found)} pipelines")
        for code in found:
            report(code)


if __name__ == "__main__":
    main()

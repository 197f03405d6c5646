"""How far each matmul kernel is from what this machine can do: format by instruction set by rows.

    python bench/kernels.py --formats q4_0 q6_k --rows 1 2 4 8 16 512 -t 2 --csv bench/results/machine.csv

Few rows are bound by memory: weights of a GB or more are walked, so that no cache holds them, and each timing
alternates with a plain read of the same bytes; the table gives GB/s and percent of that read. Many rows are bound by
arithmetic and are timed on one matrix: GOP/s (2 per multiply-add). `busy` is CPU time by threads x wall: well below 1,
others had the cores. `--isas portable` measures the backend without a compiler, in GB/s of the panels it has unpacked.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
from harness import write_csv

from gemma4q import abi
from gemma4q.abi import TensorType, ffi, lib, row_bytes
from gemma4q.backends.native import WEIGHT, anonymous, isas
from gemma4q.backends.portable_panels import Crew, Panels, product, repack
from gemma4q.gguf.quants import quantize
from gemma4q.measure.worker import Timed

PORTABLE = "portable"  # among the instruction sets
FORMATS = [t.name.lower() for t in TensorType if t in abi.BLOCKS]
BOUND_BY_MEMORY = 16  # rows up to which a walk over many matrices is timed
COLUMNS = (
    "when",
    "machine",
    "threads",
    "isa",
    "format",
    "rows",
    "cols",
    "out",
    "gb_s",
    "percent_of_read",
    "gop_s",
    "busy",
)
PERIOD = 1 << 24  # bytes of random blocks that are repeated to fill the working set


class Bench:
    """A pool, and matrices [out, cols] of one format laid out behind each other in `data`."""

    def __init__(self, threads: int, cols: int, out: int, working_set: int):
        self.threads, self.cols, self.out, self.working_set = threads, cols, out, working_set
        self.pool = ffi.gc(lib.pool_new(threads), lib.pool_free)
        self.scratch = anonymous(lib.scratch_bytes(threads))
        self.data = anonymous(working_set)
        self.random = np.random.default_rng(1)

    def fill(self, type: TensorType) -> None:
        """Random bits everywhere, but scales that are small halves: no kernel may meet a NaN or a denormal."""
        size = abi.BLOCKS[type][1]
        period = self.random.integers(0, 256, PERIOD // size * size, np.uint8)
        tame(period.reshape(-1, size), type)
        for first in range(0, len(self.data), len(period)):
            part = self.data[first : first + len(period)]
            part[:] = period[: len(part)]

    def matrices(self, type: TensorType) -> np.ndarray:
        bytes = row_bytes(type, self.cols) * self.out
        count = max(1, self.working_set // bytes)
        return np.array([self.weight(type, bytes, number) for number in range(count)], WEIGHT)

    def weight(self, type: TensorType, bytes: int, number: int) -> tuple:
        return (self.data.ctypes.data + number * bytes, bytes, type, 0, self.out, self.cols, 1, 1.0)

    def matmul(self, isa: int, weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> Timed:
        prompt = len(x) if len(x) > BOUND_BY_MEMORY else 0  # as they are in use: one token's rows, a prompt's
        first, scratch = ffi.cast("weight *", weights.ctypes.data), abi.address(self.scratch)
        into, out = ffi.cast("float *", x.ctypes.data), ffi.cast("float *", y.ctypes.data)
        with Timed() as timed:
            if lib.matmul_once(self.pool, isa, first, len(weights), into, out, len(x), prompt, scratch):
                raise SystemExit("no kernel for this format")
        return timed

    def panels(self, type: TensorType) -> list[Panels]:
        """What the portable backend makes of the first matrix, as often as the working set holds it."""
        shape = self.out, self.cols
        one = repack(self.data[: row_bytes(type, self.cols) * self.out], shape, type, Crew(self.threads))
        count = max(1, self.working_set // Panels.bytes(shape, type))
        return [Panels(one.q.copy(), one.scale.copy(), one.minimum.copy(), one.group, one.rows) for _ in range(count)]

    def read(self) -> float:
        """GB/s of a plain read of the working set."""
        return lib.read_bandwidth(self.pool, abi.address(self.data), len(self.data)) / 1e9


def tame(blocks: np.ndarray, type: TensorType) -> None:
    """Gives every scale of the blocks (bytes [blocks, size]) a small, normal value."""
    if abi.BLOCKS[type][0] == 1:
        values = np.random.default_rng(2).normal(0, 0.02, len(blocks)).astype(np.float32)
        blocks[:] = quantize(values[:, None], type)
        return
    fields = blocks.view(abi.dtype(f"block_{type.name.lower()}"))[:, 0]
    for name in fields.dtype.names:
        if fields.dtype[name] == np.float16:
            fields[name] = 0.001
    if type == TensorType.MXFP4:
        fields["e"] = 120


def compiled(bench: Bench, isa: str, type: TensorType, rows: int) -> tuple[int, list, Callable[[list], Timed]]:
    """Bytes of a matrix, matrices, and what multiplies rows with a list of them."""
    level = next(i for i in range(lib.isa_count()) if ffi.string(lib.isa_name(i)).decode() == isa)
    x = bench.random.normal(0, 1, (rows, bench.cols)).astype(np.float32)
    y = np.zeros((rows, bench.out), np.float32)
    bytes = row_bytes(type, bench.cols) * bench.out
    return bytes, bench.matrices(type), lambda weights: bench.matmul(level, weights, x, y)


def portable(bench: Bench, isa: str, type: TensorType, rows: int) -> tuple[int, list, Callable[[list], Timed]]:
    """As `compiled`."""
    crew = Crew(bench.threads)
    x = bench.random.normal(0, 1, (rows, bench.cols)).astype(np.float32)

    def matmul(weights: list[Panels]) -> Timed:
        with Timed() as timed:
            for panels in weights:
                product(x, panels, 0, crew)
        return timed

    return Panels.bytes((bench.out, bench.cols), type), bench.panels(type), matmul


def measure(bench: Bench, isa: str, type: TensorType, rows: int, runs: int) -> dict:
    """Medians of `runs` timings, each beside a plain read where memory is the bound."""
    matrix_bytes, weights, matmul = (portable if isa == PORTABLE else compiled)(bench, isa, type, rows)
    weights = weights if rows <= BOUND_BY_MEMORY else weights[:1]
    matmul(weights[:1])
    bytes = len(weights) * matrix_bytes
    speeds, shares, busy = [], [], []
    for _ in range(runs):
        timed = matmul(weights)
        speeds.append(bytes / timed.seconds / 1e9)
        shares.append(100 * speeds[-1] / bench.read() if rows <= BOUND_BY_MEMORY else np.nan)
        busy.append(timed.cpu_seconds / (bench.threads * timed.seconds))
    operations = 2 * rows * bench.cols * bench.out * len(weights) / bytes
    return {
        "isa": isa,
        "format": type.name.lower(),
        "rows": rows,
        "gb_s": median(speeds),
        "percent_of_read": median(shares),
        "gop_s": median(speeds) * operations,
        "busy": median(busy),
    }


def cases(given: argparse.Namespace, bench: Bench) -> Iterator[dict]:
    for name in given.formats:
        type = TensorType[name.upper()]
        if given.cols % abi.BLOCKS[type][0]:
            raise SystemExit(f"{name}: {given.cols} columns are not whole blocks")
        bench.fill(type)
        for isa in given.isas:
            for rows in given.rows:
                yield measure(bench, isa, type, rows, given.runs)


def main() -> None:
    if abi.missing:
        raise SystemExit(abi.missing)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["q4_0", "q8_0", "q4_k", "q6_k"])
    parser.add_argument("--isas", nargs="+", choices=[*isas(), PORTABLE], default=list(isas()))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 512])
    parser.add_argument("--cols", type=int, default=2816)
    parser.add_argument("--out", type=int, default=5632, help="rows of the weight matrix")
    parser.add_argument("--gb", type=float, default=1.5, help="working set; beyond every cache of the machine")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    bench = Bench(given.threads, given.cols, given.out, int(given.gb * 1e9))
    print(f"plain read: {max(bench.read() for _ in range(3)):.1f} GB/s, {given.threads} threads")
    print(f"{'format':8} {'isa':10} {'rows':>5} {'GB/s':>8} {'of read':>8} {'GOP/s':>9} {'busy':>5}")
    results = []
    for case in cases(given, bench):
        share = "" if np.isnan(case["percent_of_read"]) else f"{case['percent_of_read']:7.0f}%"
        print(f"{case['format']:8} {case['isa']:10} {case['rows']:5} {case['gb_s']:8.2f} {share:8} "
              f"{case['gop_s']:9.0f} {case['busy']:5.2f}", flush=True)  # fmt: skip
        results.append(case)
    if given.csv:
        common = {"when": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": platform.node(), "threads": given.threads}
        common |= {"cols": given.cols, "out": given.out}
        write_csv(given.csv, COLUMNS, (common | case for case in results), add=True)


if __name__ == "__main__":
    main()

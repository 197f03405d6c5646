"""The memory a model will take, reckoned before anything is allocated, and refused when it is not there.

Two kinds: the mapped file, which the system reads in and drops as it likes, and memory of our own, which it cannot.
Backends say what they need; this file adds what the engine needs, chooses the limits, and compares with the machine.
"""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..abi import OpCode, TensorType
from ..backends import Backend, TensorData
from ..errors import Gemma4qError
from ..model.config import Config
from ..plan.batch import Batch, Limits
from ..plan.plan import Plan
from .cgroup import memory_left
from .kv_cache import global_pages, local_pages

MB = 1 << 20
ROWS = 1152  # of a step: an image of 1,120 tokens and its neighbours
WANTED = 32
DEFAULT_CONTEXT, LEAST_CONTEXT = 8192, 4096
STACK_BYTES = 8 * MB  # of a thread, counted in address space only
NAMES = {
    "arena": "activations",
    "scratch": "scratch of the threads",
    "rows": "rows of per-layer embeddings",
    "results": "results of a step",
    "weights": "weights, unpacked",
}


@dataclass(frozen=True)
class Entry:
    """Bytes for one purpose, part of the mapped file or our own. touched: of these, read or written in each step."""

    name: str
    bytes: int
    mapped: bool
    touched: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes with `limits`. available: (bytes, why no more) of our own memory that can still be had."""

    limits: Limits
    entries: tuple[Entry, ...]
    available: tuple[int, str]

    @property
    def context(self) -> int:
        return self.limits.context

    @property
    def anonymous(self) -> int:
        """Bytes of our own memory when the model is loaded, with what the process has already."""
        return sum(e.bytes for e in self.entries if not e.mapped)

    @property
    def mapped(self) -> int:
        return sum(e.bytes for e in self.entries if e.mapped)

    @property
    def touched(self) -> int:
        """Bytes of the file that each step reads: less memory than this and every token waits for the disk."""
        return sum(e.touched for e in self.entries if e.mapped)

    @property
    def missing(self) -> int:
        """Bytes that are not there."""
        return max(0, self.needed - self.available[0])

    @property
    def needed(self) -> int:
        """Bytes yet to be allocated."""
        return sum(e.bytes for e in self.entries if not e.mapped and e.name != RUNTIME)

    @property
    def file_fits(self) -> bool:
        """Whether the weights stay in memory once they are read."""
        weights = sum(e.bytes for e in self.entries if e.name == WEIGHTS)
        return weights <= self.available[0] - self.needed

    def check(self) -> None:
        """Raises `too_big` with what is needed and what is there."""
        if self.missing:
            have, why = self.available
            what = f"{self.needed / MB:,.0f} MB of memory are needed for a context of {self.context:,} tokens"
            raise Gemma4qError(
                "too_big", f"{what}, {have / MB:,.0f} MB are there ({why}): use less context or a smaller model"
            )

    def __str__(self) -> str:
        lines = [f"{e.bytes / MB:10,.1f} MB  {'file  ' if e.mapped else 'memory'}  {e.name}" for e in self.entries]
        have, why = self.available
        return "\n".join([
            *lines,
            f"{self.anonymous / MB:10,.1f} MB  memory  in all, for a context of {self.context:,} tokens",
            f"{have / MB:10,.1f} MB  memory  can be had ({why})",
            f"{self.touched / MB:10,.1f} MB  file    read in each step",
        ])  # fmt: skip


RUNTIME, WEIGHTS = "Python and tokenizer", "weights"


def limits_for(context: int, sequences: int, window: int) -> Limits:
    """What a step and the cache hold, for `sequences` of `context` positions each."""
    rows = max(min(ROWS, context), sequences)
    return Limits(
        rows=rows,
        wanted=max(min(WANTED, rows), sequences),
        sequences=sequences,
        context=context,
        global_pages=global_pages(context, sequences),
        local_pages=local_pages(window, sequences, rows),
    )


def plan_memory(
    config: Config, plan: Plan, tensors: Mapping[str, TensorData], file_bytes: int, backend: Backend,
    kv: TensorType, threads: int, context: int | None, sequences: int, runtime: int, available: tuple[int, str],
    isa: str | None = None,
) -> MemoryPlan:  # fmt: skip
    """The plan for a context, or (None) for the larger of 8,192 and 4,096 tokens that fits.

    runtime: bytes of our own that the process has before it loads; available: what `available_memory` found then.
    Raises `bad_option` for a context the model was not trained for. Whether it fits is `check`'s to say.
    """
    trained = config.context_length
    if context is not None and not 1 <= context <= trained:
        raise Gemma4qError("bad_option", f"context: {context:,} tokens; this model was trained for 1 to {trained:,}")
    if not 1 <= sequences <= 256:
        raise Gemma4qError("bad_option", f"sequences: {sequences} is not in 1 .. 256")
    window = max(layer.window for layer in config.layers)

    def with_context(size: int) -> MemoryPlan:
        limits = limits_for(size, sequences, window)
        needs = backend.memory(plan, tensors, limits, kv, threads, isa)
        batch = Batch(limits, plan.width, plan.vocab).memory.nbytes
        return MemoryPlan(limits, entries(plan, tensors, file_bytes, needs, batch, runtime, limits), available)

    if context is not None:
        return with_context(context)
    plans = [with_context(min(size, trained)) for size in (DEFAULT_CONTEXT, LEAST_CONTEXT)]
    return next((p for p in plans if not p.missing), plans[-1])


def entries(
    plan: Plan, tensors: Mapping[str, TensorData], file_bytes: int, needs: Mapping[str, int], batch: int, runtime: int,
    limits: Limits,
) -> tuple[Entry, ...]:  # fmt: skip
    """The lines of a plan, from what a backend needs of its own and what lies in the file."""
    read, looked_up = touched_weights(plan, tensors)
    weights = sum(tensors[name].data.nbytes for name in read)
    tables = sum(tensors[name].data.nbytes for name in looked_up)
    copied = "weights" in needs  # such a backend reads its own copy
    found = [
        Entry(WEIGHTS, weights, True, 0 if copied else sum(read.values())),
        Entry("look-up tables, read row by row", tables, True, 0),
        Entry("rest of the file", file_bytes - weights - tables, True, 0),
    ]
    found += [Entry(NAMES.get(n, n), size, False, size) for n, size in needs.items() if n != "kv"]
    local = sum(positions(plan, limits, local=True))
    shares = {"keys and values, sliding": local, "keys and values, global": sum(positions(plan, limits, local=False))}
    for name, share in shares.items():
        size = needs["kv"] * share // max(1, sum(shares.values()))
        found.append(Entry(name, size, False, size))
    found += [Entry("a step's rows", batch, False, batch), Entry(RUNTIME, runtime, False, runtime)]
    return tuple(entry for entry in found if entry.bytes)


def positions(plan: Plan, limits: Limits, local: bool) -> list[int]:
    """Values kept in each sliding (`local`) or global layer, in pages."""
    pages = limits.local_pages if local else limits.global_pages
    return [pages * kv.kv_heads * (kv.key_dim + kv.head_dim) for kv in plan.kv if kv.local == local]


def touched_weights(plan: Plan, tensors: Mapping[str, TensorData]) -> tuple[dict[str, int], list[str]]:
    """Bytes of each tensor that a generated token reads, and the tables of which only rows are looked up."""
    tables = (OpCode.EMBED, OpCode.EMBED_ROWS)
    read: dict[str, int] = {}
    for op in plan.ops:
        share = op.args["used"] / op.args["experts"] if op.code in (OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN) else 1.0
        if op.code not in tables:
            read |= {w.tensor: int(tensors[w.tensor].data.nbytes * share) for w in op.weights}
    looked_up = {w.tensor for op in plan.ops if op.code in tables for w in op.weights}
    return read, sorted(looked_up - set(read))


def own_memory(root: Path = Path("/")) -> int:
    """Bytes of memory of its own that this process has now."""
    status = _fields(root / "proc/self/status")
    return status["RssAnon"] if "RssAnon" in status else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory(threads: int = 0, root: Path = Path("/")) -> tuple[int, str]:
    """Bytes of our own memory that can still be had, and what sets the limit."""
    limits = [(1 << 62, "no limit is known")]
    machine = _fields(root / "proc/meminfo")
    if "MemAvailable" in machine:
        limits.append((machine["MemAvailable"], "free on this machine"))
    if (left := memory_left(root)) is not None:
        limits.append((left, "left in this control group"))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        used = _fields(root / "proc/self/status").get("VmSize", 0)
        limits.append((max(0, most - used - threads * STACK_BYTES), "left of the address space, ulimit -v"))
    return min(limits)


def _fields(path: Path) -> dict[str, int]:
    """`Name: 123 kB` lines as bytes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}

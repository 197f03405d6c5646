"""How many threads compute: as many as we have cores and time for, and why.

More threads than cores, or than a container's quota, make every step wait for the slowest: that is the commonest reason
for an engine that crawls.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import Gemma4qError
from .cgroup import cpu_quota

MOST = 1024


@dataclass(frozen=True)
class Threads:
    """`count`, the least of what `limits` say: (why, how many)."""

    count: int
    limits: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return f"{self.count} ({', '.join(f'{why}: {number:g}' for why, number in self.limits)})"


def choose_threads(asked: int | None = None, root: Path = Path("/")) -> Threads:
    """max(1, min(affinity, physical cores, floor(quota))), or as many as asked. Raises `bad_option`."""
    if asked is not None:
        if not 1 <= asked <= MOST:
            raise Gemma4qError("bad_option", f"threads: {asked} is not in 1 .. {MOST}")
        return Threads(asked, (("asked for", asked),))
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    limits = [("CPUs we may run on", len(cpus)), ("cores among them", physical_cores(cpus, root))]
    if (quota := cpu_quota(root)) is not None:
        limits.append(("CPU quota", quota))
    return Threads(max(1, int(min(number for _, number in limits))), tuple(limits))


def physical_cores(cpus: list[int], root: Path = Path("/")) -> int:
    """Cores that these CPUs belong to; two threads of one core count once."""
    cores = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(f"cpu {cpu}")
    return len(cores)

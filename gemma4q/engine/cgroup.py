"""What this process's control groups allow it: CPU time and memory, cgroup v1 and v2. Where there are none: no limit.

Every function takes the file system's root, so that a test can build a machine of its own.
"""

from pathlib import Path

UNLIMITED = 1 << 60  # v1 writes "no limit" as the largest page-aligned number


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs' time the tightest of our groups grants; None: no limit."""
    quotas = []
    for group in _groups("cpu", root):
        quota = _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us") + _numbers(
            group / "cpu.cfs_period_us"
        )
        if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
            quotas.append(quota[0] / quota[1])
    return min(quotas, default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that the tightest of our groups still grants, its file cache counted as free; None: no limit."""
    left = []
    for group in _groups("memory", root):
        limit = _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
        used = _numbers(group / "memory.current") or _numbers(group / "memory.usage_in_bytes")
        if limit and used and 0 <= limit[0] < UNLIMITED:
            left.append(max(0, limit[0] - used[0] + _file_cache(group)))
    return min(left, default=None)


def _file_cache(group: Path) -> int:
    """Bytes of file pages in a group and all below it, which the system drops before it runs out."""
    pairs = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    prefix = "total_" if "total_inactive_file" in pairs else ""
    return sum(int(pairs.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _groups(controller: str, root: Path) -> list[Path]:
    """The directories of the group we are in and of all above it, under v1 and v2 where both are mounted."""
    own = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # v2's list is empty: its key is ""
    groups = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        top, point = mount.split(" ")[3:5]
        kind, _, options = kind.split(" ", 2)
        name = (
            "" if kind == "cgroup2" else controller if kind == "cgroup" and controller in options.split(",") else None
        )
        if name is None or name not in own:
            continue
        base, path = root / point.lstrip("/"), Path(own[name])
        inside = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else Path()
        groups += [base / inside, *(base / parent for parent in inside.parents)] if inside.parts else [base]
    return groups


def _numbers(path: Path) -> list[int]:
    """The file's numbers; `max` is -1. Empty when there is no such file."""
    words = _text(path).split()
    return [-1 if word == "max" else int(word) for word in words] if all(map(_is_number, words)) else []


def _is_number(word: str) -> bool:
    return word == "max" or word.removeprefix("-").isdecimal()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

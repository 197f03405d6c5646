"""Threads and memory that control groups allow, on machines built of files."""

from pathlib import Path

import pytest

from gemma4q.engine import threads
from gemma4q.engine.cgroup import cpu_quota, memory_left
from gemma4q.engine.threads import choose_threads, physical_cores
from gemma4q.errors import Gemma4qError

V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
CONTAINER = V2.replace(" / /sys", " /docker/abc /sys")


def machine(root: Path, mounts: str, own: str, **files: str) -> Path:
    """A root directory with these mounts, our groups, and files under /sys/fs/cgroup (`__` for a slash)."""
    contents = {"proc/self/mountinfo": "20 1 0:1 / / rw - ext4 /dev/sda rw\n" + mounts, "proc/self/cgroup": own}
    contents |= {"sys/fs/cgroup/" + name.replace("__", "/").replace("_DOT_", "."): text for name, text in files.items()}
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_no_control_groups_mean_no_limit(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert memory_left(tmp_path) is None


def test_v2_takes_the_tightest_group_on_the_way_up(tmp_path):
    root = machine(
        tmp_path, V2, "0::/a/b\n", cpu_DOT_max="max 100000", a__cpu_DOT_max="150000 100000",
        a__b__cpu_DOT_max="400000 100000", a__memory_DOT_max="1000", a__memory_DOT_current="900",
        a__memory_DOT_stat="anon 5\nfile 600\nactive_file 100\ninactive_file 200\n",
        a__b__memory_DOT_max="max", a__b__memory_DOT_current="800",
    )  # fmt: skip
    assert cpu_quota(root) == 1.5
    assert memory_left(root) == 1000 - 900 + 300


def test_v1_counts_the_file_cache_of_all_groups_below(tmp_path):
    files = {
        "cpu,cpuacct__x__cpu_DOT_cfs_quota_us": "250000", "cpu,cpuacct__x__cpu_DOT_cfs_period_us": "100000",
        "cpu,cpuacct__cpu_DOT_cfs_quota_us": "-1", "cpu,cpuacct__cpu_DOT_cfs_period_us": "100000",
        "memory__memory_DOT_limit_in_bytes": "9223372036854771712", "memory__memory_DOT_usage_in_bytes": "5",
        "memory__y__memory_DOT_limit_in_bytes": "1000", "memory__y__memory_DOT_usage_in_bytes": "700",
        "memory__y__memory_DOT_stat": "active_file 1\ntotal_active_file 20\ntotal_inactive_file 30\n",
    }  # fmt: skip
    root = machine(tmp_path, V1, "4:memory:/y\n1:cpu,cpuacct:/x\n", **files)
    assert cpu_quota(root) == 2.5
    assert memory_left(root) == 350


@pytest.mark.parametrize("own", ["0::/docker/abc\n", "0::/\n", "0::/../../elsewhere\n"])
def test_a_container_sees_its_own_group_as_the_mount(tmp_path, own):
    assert cpu_quota(machine(tmp_path, CONTAINER, own, cpu_DOT_max="50000 100000")) == 0.5


def test_nonsense_in_these_files_is_no_limit(tmp_path):
    root = machine(tmp_path, V2, "0::/\n", cpu_DOT_max="a lot", memory_DOT_max="", memory_DOT_current="7")
    assert cpu_quota(root) is None
    assert memory_left(root) is None


def cores(root: Path, *siblings: str) -> Path:
    for cpu, text in enumerate(siblings):
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(text + "\n")
    return root


def test_two_threads_of_a_core_count_once_and_a_hidden_topology_counts_all(tmp_path):
    assert physical_cores([0, 1, 2], cores(tmp_path, "0,2", "1,3", "0,2", "1,3")) == 2
    assert physical_cores([0, 1, 2], tmp_path / "nowhere") == 3


@pytest.mark.parametrize(
    "quota, count", [("50000", 1), ("100000", 1), ("199000", 1), ("350000", 3), ("900000", 4), ("max", 4)]
)
def test_threads_are_the_least_of_affinity_cores_and_whole_quota(tmp_path, monkeypatch, quota, count):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(6)))
    root = machine(cores(tmp_path, "0-1", "0-1", "2-3", "2-3", "4", "5"), V2, "0::/\n", cpu_DOT_max=f"{quota} 100000")
    chosen = choose_threads(root=root)
    assert chosen.count == count
    assert str(chosen).startswith(f"{count} (CPUs we may run on: 6, cores among them: 4")


def test_threads_asked_for_are_taken_and_checked():
    assert choose_threads(7).count == 7
    for asked in (0, -1, 100_000):
        with pytest.raises(Gemma4qError, match="bad_option"):
            choose_threads(asked)

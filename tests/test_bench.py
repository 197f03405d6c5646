"""The bench: its arithmetic against plain counting, its gate against made-up machines, its command against a toy."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gemma4q.abi import OpCode
from gemma4q.cli import cli
from gemma4q.cli.numbers import Numbers
from gemma4q.errors import Gemma4qError
from gemma4q.measure import base, gate, history, verdict, versus
from gemma4q.measure.cost import Costs
from gemma4q.measure.pairs import Pairs, Run, sit
from gemma4q.measure.pairs import Test as Work
from gemma4q.measure.worker import Gemma4q, Timed

GOLDEN = Path(__file__).parent / "data/golden"
TOY = str(GOLDEN / "e2b-like.gguf")
ERROR_LINE = re.compile(r"error: [a-z_0-9]+: .+\n")


def bench(*arguments: str):
    return CliRunner().invoke(cli, ["bench", *arguments])


# -- Lists and ranges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("512", (512,)),
        ("1,2,4", (1, 2, 4)),
        ("1-4", (1, 2, 3, 4)),
        ("0-8192+2048", (0, 2048, 4096, 6144, 8192)),
        ("512-4096*2", (512, 1024, 2048, 4096)),
        ("1-10+4,16", (1, 5, 9, 16)),
        ("7-7*3", (7,)),
    ],
)
def test_numbers_are_read_as_llama_bench_reads_them(text, numbers):
    assert Numbers().convert(text, None, None) == numbers


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "4-1", "1-4*1", "0-8*2", "1-4+0", "0-99999", "1.5", "9" * 12])
def test_numbers_that_make_no_list_are_wrong_usage(text):
    assert bench(TOY, f"-p={text}").exit_code == 2


# -- Statistics ---------------------------------------------------------------------------------------------


def pairs_of(noise: np.ndarray, sittings: int = 5, slower: float = 0.0, kernel: float | None = None) -> Pairs:
    """Pairs of runs that take exp(noise [n, 2]) times as long; the first side's exp(slower) times as long besides.

    `kernel`: half the time is a kernel's, and that part takes exp(kernel) times as long.
    """
    pairs = Pairs(Work(prompt=32), sitting=[i * sittings // len(noise) for i in range(len(noise))])
    for a, b in np.exp(noise).tolist():
        names = [] if kernel is None else ["matmul"]
        ops = ([0.05e9 * a * math.exp(kernel or 0.0)], [0.05e9 * b])
        first = Run(0.1 * a * math.exp(slower), 1, names, ops[0][: len(names)])
        pairs.kept.append((first, Run(0.1 * b, 1, names, ops[1][: len(names)])))
    return pairs


def test_an_interval_is_that_of_all_pairwise_averages_and_holds_what_it_should():
    random = np.random.default_rng(1)
    few = random.normal(0, 1, 12)
    averages = sorted((a + b) / 2 for i, a in enumerate(few) for b in few[i:])
    estimate, low, high = verdict.interval(few, 1.0)
    assert estimate == pytest.approx(float(np.median(averages)))
    assert low in averages and averages.index(low) == len(averages) - 1 - averages.index(high)
    held = 0
    for _ in range(400):  # a heavy-tailed sample around 0.5, limits of 95 %
        _, low, high = verdict.interval(0.5 + random.standard_t(2, 40), 1.96)
        held += low <= 0.5 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_five_percent_is_always_seen_and_nothing_never_called_slower():
    """The noise of a machine: 2 % from run to run, outliers, half a percent that stays as long as a process lives."""
    random = np.random.default_rng(2)
    for number in range(200):
        slower = number % 2
        noise = random.normal(0, 0.014, (80, 2)) + (random.random((80, 2)) < 0.03) * random.uniform(0, 0.6, (80, 2))
        noise[:, 0] += np.repeat(random.normal(0, 0.005, 5), 16)
        whole, kernel = verdict.judge([pairs_of(noise, kernel=slower * math.log(1.05))], 0.03)
        assert whole.verdict == "same"
        assert (kernel.verdict == "slower") == bool(slower), kernel
        assert kernel.name == "pp32: matmul" and kernel.share == pytest.approx(0.5, rel=0.05)


def pairs_of_ops(slower: np.ndarray, seed: int, count: int = 80, disturbed: float = 0.05) -> Pairs:
    """Pairs of runs of as many ops, half matmul, half attend; the first side's take exp(slower) times as long.

    A run's ops share 1 % of noise, each has 5 % of its own, and some of them take up to ten times as long.
    """
    random = np.random.default_rng(seed)
    shape = (count, 2, len(slower))
    noise = random.normal(0, 0.01, (count, 2, 1)) + random.normal(0, 0.05, shape)
    noise += (random.random(shape) < disturbed) * random.uniform(0, math.log(10), shape)
    noise[:, 0] += slower
    times = 1e6 * np.exp(noise)
    names = ["matmul", "attend"] * (len(slower) // 2)
    pairs = Pairs(Work(decode=1), sitting=[i * 5 // count for i in range(count)])
    pairs.kept = [tuple(Run(ops.sum() / 0.99e9, 1, names, list(ops)) for ops in both) for both in times]
    return pairs


def test_what_disturbs_single_ops_hides_no_five_percent():
    slower = np.array([math.log(1.05), 0.0] * 50)
    for seed in range(20):
        whole, *kernels = verdict.judge([pairs_of_ops(slower, seed)], 0.03)
        assert {row.kernel: row.verdict for row in kernels} == {"matmul": "slower", "attend": "same"}
        assert whole.verdict != "slower" and abs(whole.change - 0.025) < 0.012
        assert all(row.high - row.low < 0.02 for row in (whole, *kernels))


def test_a_kernels_change_is_that_of_its_ops_by_their_share_of_the_time():
    slower = np.zeros(100)
    slower[:24:2] = math.log(1.25)  # 12 of 50 matmuls
    _, *kernels = verdict.judge([pairs_of_ops(slower, 1)], 0.03)
    (matmul,) = (row for row in kernels if row.kernel == "matmul")
    assert matmul.verdict == "slower" and abs(matmul.change - (1.25 ** (12 / 50) - 1)) < 0.01


def test_limits_of_a_change_hold_it_as_often_as_they_say():
    held = 0
    for seed in range(400):
        pairs = pairs_of_ops(np.full(20, 0.04), seed)
        times = np.array([[run.ops for run in runs] for runs in pairs.kept])
        better, _ = verdict.better_of_two(times, np.array(pairs.sitting))
        _, low, high = verdict.interval(verdict.differences(better), 1.96)
        held += low <= 0.04 <= high
    assert 0.92 <= held / 400 <= 0.985


def test_of_two_pairs_of_a_sitting_the_shorter_times_are_taken():
    times = np.array([[5, 1], [4, 2], [9, 9], [7, 3], [6, 8]])[:, :, None]
    better, sittings = verdict.better_of_two(times, np.array([0, 0, 0, 1, 1]))
    assert better[:, :, 0].tolist() == [[4, 1], [6, 3]] and sittings.tolist() == [0, 1]


def test_plans_that_differ_are_compared_by_the_whole_of_a_kernel():
    pairs = pairs_of_ops(np.array([math.log(1.2), 0.0] * 50), 1, disturbed=0)
    for i, (first, other) in enumerate(pairs.kept):
        pairs.kept[i] = first, Run(other.seconds, 1, [*other.names, "copy"], [*other.ops, 10])
    _, *kernels = verdict.judge([pairs], 0.03)
    assert {row.kernel: row.verdict for row in kernels} == {"matmul": "slower", "attend": "same"}


def test_a_process_that_lies_badly_in_memory_alarms_nobody():
    noise = np.random.default_rng(3).normal(0, 0.01, (80, 2))
    noise[:32, 0] += 0.10  # two sittings of five
    (row, *_) = verdict.judge([pairs_of(noise)], 0.03)
    assert row.verdict != "slower"


def test_a_gain_is_told_and_is_no_alarm():
    noise = np.random.default_rng(4).normal(0, 0.01, (80, 2))
    (row, *_) = verdict.judge([pairs_of(noise, slower=-0.06)], 0.03)
    assert row.verdict == "faster" and gate.Outcome([row], [], 1.0).exit == 0


@pytest.mark.parametrize("spread, count", [(0.5, 80), (0.01, 5), (0.0, 0)])
def test_too_much_noise_or_too_few_pairs_are_unclear(spread, count):
    noise = np.random.default_rng(5).normal(0, spread, (count, 2))
    (row, *_) = verdict.judge([pairs_of(noise)], 0.03)
    assert row.verdict == "unclear" and gate.Outcome([row], [], 1.0).exit == 3


# -- Turns --------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A worker made up: `slow` times as slow in its kernel; what all have asked is in `log`."""

    name: str
    log: list
    slow: float = 1.0
    busy: float = 1.0
    threads: int = 2

    def __post_init__(self):
        self.random = np.random.default_rng(sum(map(ord, self.name)) + len(self.log))
        self.about = {"kernels": ["matmul", "attend"]}

    def ask(self, do: str, **arguments) -> dict:
        self.log.append((self.name, do))
        noise = math.exp(self.random.normal(0, 0.01))
        times = [0.006 * self.slow * noise, 0.004 * noise]
        idle = self.random.random() < 0.2  # a fifth has company, and takes three times as long for it
        seconds = sum(times) * (3 if idle else 1)
        cpu = self.threads * seconds * (0.5 if idle else self.busy)
        return {"seconds": seconds, "cpu_seconds": cpu, "ops": [int(t * 1e9) for t in times]}

    def __enter__(self):
        self.log.append((self.name, "starts"))
        return self

    def __exit__(self, *_):
        self.log.append((self.name, "ends"))


def test_sides_take_turns_and_a_run_with_company_goes_with_its_partner():
    log: list = []
    pairs = [Pairs(Work(prompt=32)), Pairs(Work(decode=1))]
    sit({0: Machine("a", log), 1: Machine("b", log)}, pairs, 0, 0.02, 0.97)
    warm, rest = log[:4], log[4:]
    assert [do for _, do in warm] == ["prompt", "prompt", "decode", "decode"]
    for at in range(0, len(rest), 4):
        assert [name for name, _ in rest[at : at + 4]] == ["a", "b", "b", "a"]
        assert len({do for _, do in rest[at : at + 4]}) == 1
    for of, do in zip(pairs, ("prompt", "decode"), strict=True):
        assert of.discarded and 2 * (len(of.kept) + of.discarded) == sum(asked == do for _, asked in rest)
        assert all(a.busy > 0.97 < b.busy for a, b in of.kept)


def test_sides_that_do_not_fit_together_are_never_alive_together():
    log: list = []
    starts = [lambda: Machine("new", log, 0.5), lambda: Machine("old", log)]
    tests = [Work(prompt=512), Work(decode=128)]
    rows, about = versus.apart(starts, tests, 5)
    alive = [event for event in log if event[1] in ("starts", "ends")]
    assert all(a[1] == "starts" and b == (a[0], "ends") for a, b in zip(alive[::2], alive[1::2], strict=True))
    order = [name for name, _ in alive[::2]]
    assert order[:4] == ["new", "old", "old", "new"] and len(about) == 2
    assert all(row["pairs"] == 5 and row["discarded"] and 1 < row["ratio"] < 2 for row in rows)


@pytest.mark.parametrize("how", [versus.beside, versus.apart])
def test_pairs_end_when_the_machine_is_never_calm(how):
    log: list = []
    rows, _ = how([lambda: Machine("new", log, busy=0.5), lambda: Machine("old", log)], [Work(prompt=32)], 3)
    assert rows[0]["pairs"] == 0 and rows[0]["ratio"] is None and rows[0]["discarded"] == 12


def compare(slow: float, busy: float = 1.0) -> tuple[gate.Outcome, list]:
    log: list = []
    starts = [lambda: Machine("new", log, slow, busy), lambda: Machine("old", log)]
    return gate.compare(starts, 0.03, seconds=2.0), log


def test_the_gate_names_the_slower_kernel_and_no_other():
    outcome, log = compare(1.05)
    assert outcome.exit == 1
    named = {row.name for row in outcome.rows if row.verdict == "slower" and row.kernel}
    assert named == {"pp32 @ d256: matmul", "tg1 @ d256: matmul"}
    starts = [name for name, do in log if do == "starts"]
    assert starts[:4] == ["new", "old", "old", "new"] and len(starts) % 2 == 0


def test_the_gate_passes_equals():
    outcome, _ = compare(1.0)
    assert outcome.exit == 0 and 0.2 < outcome.discarded < 0.5


def test_the_gate_says_when_it_cannot_tell_and_comes_to_an_end():
    outcome, _ = compare(1.0, busy=0.5)
    assert outcome.exit == 3 and outcome.discarded == 1.0 and outcome.seconds < 6


# -- What was saved ------------------------------------------------------------------------------------------


def saved(speed: float = 1.0, machine: float = 1.0, noise: float = 0.002) -> dict:
    """A measurement of five runs on a machine that gives `machine` times as much."""
    random = np.random.default_rng(int(1000 * speed))
    seconds = [0.5 / speed / machine * math.exp(random.normal(0, noise)) for _ in range(5)]
    result = {"backend": "native", "isa": "avx512", "threads": 2, "kv": "f16", "batch": 512, "test": "tg8"}
    result |= {"n_prompt": 0, "samples_ns": [round(s * 1e9) for s in seconds], "samples_ts": [8 / s for s in seconds]}
    result |= {"probes": {"read": [2e10 * machine] * 5, "gemm": [1e11] * 5}}
    result |= {"kernels": {"matmul": [s * 0.9 for s in seconds], "add": [1e-9] * 5}}
    model = {"name": "m", "sha256": "12", "type": "Q4_0"}
    about = {"processor": "AMD EPYC", "cores": 2}
    return {"model": model, "results": [result], "machine": about, "build": {"commit": "abc"}}


@pytest.mark.parametrize("machine", [1.0, 1.1, 0.9])
def test_a_loss_beyond_its_doubt_is_told_whatever_the_machine_gives(machine):
    whole, kernel = base.compare(saved(), saved(0.8, machine)["results"], Path("b"))
    for row in (whole, kernel):
        assert row.beyond(0.03) and abs(math.log((1 + row.change) / 1.25)) < math.log(1 + row.doubt)
    assert kernel.name == "tg8: matmul" and whole.machine == pytest.approx(machine - 1)


def test_the_machines_mood_is_no_loss_and_adds_to_the_doubt():
    (calm, _), (moved, _) = (base.compare(saved(), saved(1.0, m)["results"], Path("b")) for m in (1.0, 0.6))
    assert not calm.beyond(0.03) and not moved.beyond(0.03)
    assert moved.doubt > calm.doubt + 0.1
    (noisy, _) = base.compare(saved(noise=0.1), saved(0.95, noise=0.1)["results"], Path("b"))
    assert noisy.doubt > 0.1 and not noisy.beyond(0.03)


def test_what_was_saved_is_found_again_and_is_of_this_model(tmp_path):
    path = tmp_path / "base.json"
    base.save(path, saved())
    assert base.load(path, {"sha256": "12"})["results"] == saved()["results"]
    with pytest.raises(Gemma4qError, match=r"bad_base: .* is of another model file: m, SHA-256 12"):
        base.load(path, {"sha256": "34"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["results"][0].pop("probes"),
        lambda d: d["results"][0].update(samples_ns=["x"] * 5),
        lambda d: d["results"][0].update(samples_ns=[0] * 5),
        lambda d: d["results"].append(7),
        lambda d: d["results"].clear(),
        lambda d: d["results"][0].update(kernels=None),
    ],
)
def test_a_damaged_base_is_one_error(damage):
    document = saved()
    damage(document)
    with pytest.raises(Gemma4qError) as caught:
        base.compare(document, saved()["results"], Path("b.json"))
    assert caught.value.kind == "bad_base" and "b.json" in caught.value.message


# -- History ---------------------------------------------------------------------------------------------------


def test_history_grows_by_commit_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for commit in ("aaa111", "bbb222"):
        path = history.add(tmp_path, saved() | {"build": {"commit": commit}})
    assert path.name == "amd-epyc-2.jsonl" and [r["commit"] for r in history.read(tmp_path)] == ["aaa111", "bbb222"]
    for name, start in (("h.png", b"\x89PNG"), ("h.svg", b"<?xml")):
        done = bench("--plot", str(tmp_path / name), "--results", str(tmp_path))
        assert done.exit_code == 0 and (tmp_path / name).read_bytes().startswith(start)
    assert "bbb222" in (tmp_path / "h.svg").read_text()


def test_history_that_is_damaged_names_the_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"when": 1}\n')
    done = bench("--plot", str(tmp_path / "h.png"), "--results", str(tmp_path))
    assert done.exit_code == 1 and "bad_history" in done.stderr and "line 1" in done.stderr


# -- Costs, and the worker itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e2b-like", "moe-like", "unified-like"])
def test_costs_count_the_bytes_that_the_executor_counts(name):
    path = str(GOLDEN / f"{name}.gguf")
    side = Gemma4q(path, {"threads": 1, "context": 128})
    side._reset(0)
    side._step(side._tokens(1), True, Timed())
    costs = Costs(path, "f32")
    matrices = (OpCode.MATMUL, OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN)
    counted = zip(costs.of(Work(decode=1)), costs.ops, strict=True)
    found = sum(cost.bytes for cost, op in counted if op.code in matrices)
    assert found == pytest.approx(side.session.result[0]["weight_bytes"], rel=1e-9)
    side.model.close()


def test_times_of_ops_add_up_to_the_run():
    side = Gemma4q(TOY, {"threads": 2, "context": 256})
    answers = [side.prompt(64, depth=32, batch=32) for _ in range(5)]
    for answer in answers:
        assert len(answer["ops"]) == len(side.about()["kernels"]) and min(answer["ops"]) >= 0
        assert sum(answer["ops"]) / 1e9 < answer["seconds"]
    assert max(sum(a["ops"]) / 1e9 / a["seconds"] for a in answers) > 0.3
    assert side.history.length == 96
    side.decode(3, depth=32)
    assert side.history.length == 35  # a second time at a depth begins there again
    side.model.close()

"""Types chosen under a budget: the best there are for so many bytes, the same every time, sure where they must be."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from gemma4q import Gemma4qError
from gemma4q.abi import TensorType as T
from gemma4q.cli import cli
from gemma4q.gguf.quants import dequantize
from gemma4q.gguf.reader import open_gguf
from gemma4q.measure.sensitivity import Divergence
from gemma4q.model import open_model
from gemma4q.quantize import noise
from gemma4q.quantize.allocate import MEASURED, OF_TENSOR, OF_TYPE, USUAL, Point, allocate, correlation, foretold, part
from gemma4q.quantize.choose import Option, choose, hull
from gemma4q.quantize.encode import Encoder
from gemma4q.quantize.grid import Grid
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.noise import errors, free, sample, size_of
from gemma4q.quantize.overrides import Overrides, pattern
from gemma4q.quantize.quantize import planned
from gemma4q.quantize.recipe import recipe, size
from gemma4q.shipped import CALIBRATION, shipped

OLD = (T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0)  # enough to choose among, and quick


@pytest.fixture(autouse=True)
def quick(quick_disk, monkeypatch) -> None:
    monkeypatch.setattr("gemma4q.measure.sensitivity.TOKENS", 200)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("half") / "tiny-F16.gguf"
    planned(shipped("tiny"), path, mixture("F16"), allow_requantize=True).write()
    return path


@pytest.fixture(scope="module")
def lost(half) -> dict[str, dict[int, float]]:
    gguf = open_gguf(half)
    return errors(gguf, Grid(gguf), free(gguf.tensors, {}), None, 2, OLD)


# -- The choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_as_many_bytes_does_much_less_harm(seed):
    """Against every combination there is: the loss is at most what one step of one tensor takes away."""
    random = np.random.default_rng(seed)
    options = {}
    for name in "abcdef":
        sizes = np.sort(random.integers(10, 200, 4))
        harms = random.uniform(0, 1) / sizes ** random.uniform(1, 3) * random.uniform(0.8, 1.2, 4) * 1e3
        options[name] = [Option(i, int(n), float(h)) for i, (n, h) in enumerate(zip(sizes, harms, strict=True))]
    least = sum(min(o.nbytes for o in each) for each in options.values())
    most = sum(max(o.nbytes for o in each) for each in options.values())
    for budget in np.linspace(least, most, 7).astype(int):
        chosen = choose(options, budget)
        assert sum(o.nbytes for o in chosen.values()) <= budget
        fitting = (c for c in itertools.product(*options.values()) if sum(o.nbytes for o in c) <= budget)
        best = min(sum(o.harm for o in c) for c in fitting)
        harm = sum(o.harm for o in chosen.values())
        steps = [a.harm - b.harm for each in options.values() for a, b in itertools.pairwise(hull(each))]
        assert best <= harm + 1e-12 and harm <= best + max(steps)
        assert chosen == choose(dict(reversed(options.items())), budget), "in whatever order they come"


def test_a_hull_has_only_steps_that_pay_less_and_less():
    options = [Option(0, 10, 9.0), Option(1, 20, 8.9), Option(2, 30, 1.0), Option(3, 30, 0.9), Option(4, 40, 2.0)]
    assert [o.type for o in hull(options)] == [0, 3]


def test_more_bytes_never_do_more_harm(half, lost):
    tensors = open_gguf(half).tensors
    total = sum(t.nbytes for t in tensors.values())
    found = [allocate(tensors, lost, {}, int(total * share)) for share in (0.32, 0.36, 0.4, 0.5, 0.6)]
    for share, one in zip((0.32, 0.36, 0.4, 0.5, 0.6), found, strict=True):
        assert one.nbytes <= total * share
    harms = [one.harm for one in found]
    assert harms == sorted(harms, reverse=True) and harms[-1] < harms[0] / 20


def test_a_budget_that_the_smallest_types_exceed_is_said(half, lost):
    with pytest.raises(Gemma4qError, match="bad_option: the target is too small: the smallest types take"):
        allocate(open_gguf(half).tensors, lost, {}, 1000)


# -- What is lost ----------------------------------------------------------------------------------------------


def test_errors_are_noise_over_energy_of_what_the_quantiser_writes(half, lost):
    gguf = open_gguf(half)
    for name in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight"):
        tensor = gguf.tensors[name]
        x = dequantize(tensor.data, tensor.type).reshape(tensor.shape).astype("f8")
        for type in OLD:
            y = dequantize(Encoder(1).encode(x.astype("f4"), type).reshape(-1), type).reshape(x.shape)
            assert lost[name][type] == pytest.approx(((x - y) ** 2).sum() / (x**2).sum(), rel=1e-5)


def test_small_projections_and_the_router_are_never_below_q8_0(half, lost):
    for name, types in lost.items():
        assert (list(types) == [T.Q8_0]) == name.endswith(("inp_gate.weight", "proj.weight")), name
    assert not any("ffn_gate_inp" in name or "norm" in name or "per_layer_model_proj" in name for name in lost)


@pytest.mark.parametrize("shape", [(3, 64), (128, 1000, 704), (262144, 1536), (5, 1 << 20)])
def test_a_sample_is_whole_rows_of_single_matrices_from_end_to_end(shape):
    pieces = sample(shape)
    rows = np.prod(shape[:-1])
    for at, count in pieces:
        assert at >= 0 and at + count <= rows and at // shape[-2] == (at + count - 1) // shape[-2] and count > 0
    assert sum(count for _, count in pieces) * shape[-1] <= max(noise.SAMPLE, noise.SPOTS * shape[-1], 3 * 64)
    assert pieces[0][0] == 0 and pieces[-1][0] + pieces[-1][1] >= rows - shape[-2]


# -- What matters ----------------------------------------------------------------------------------------------


def test_parts_that_were_measured_to_matter_get_the_bytes(half, lost):
    tensors = open_gguf(half).tensors
    budget = int(0.36 * sum(t.nbytes for t in tensors.values()))

    def measure(types):
        changed = [name for name, type in types.items() if type != tensors[name].type]
        return sum((50 if part(name) == "attn_v" else 0.01) * lost[name][types[name]] for name in changed)

    plain, weighed = (allocate(tensors, lost, {}, budget, each) for each in (None, measure))
    values = [name for name in lost if part(name) == "attn_v"]
    assert all(weighed.types[name] == T.Q8_0 for name in values)
    assert any(plain.types[name] != T.Q8_0 for name in values)
    assert len(weighed.points) > len({part(name) for name in lost}) and weighed.nbytes <= budget
    assert weighed == allocate(tensors, lost, {}, budget, measure)


def test_without_time_to_measure_the_errors_alone_decide(half, lost):
    tensors = open_gguf(half).tensors
    budget = int(0.36 * sum(t.nbytes for t in tensors.values()))
    assert allocate(tensors, lost, {}, budget, lambda types: None).types == allocate(tensors, lost, {}, budget).types


def test_a_choice_gets_as_good_as_if_every_harm_were_known(half, lost):
    """Harms add up, and noise says little of them: beside the choice of one who knows them all."""
    tensors, random = open_gguf(half).tensors, np.random.default_rng(4)
    budget = int(0.36 * sum(t.nbytes for t in tensors.values()))
    factors = {name: float(np.exp(random.normal(0, 1))) for name in lost}
    true = {n: {type: factors[n] * e for type, e in types.items()} for n, types in lost.items()}

    def measure(types):
        return sum(true[n][type] for n, type in types.items() if type != tensors[n].type)

    blind, found = (allocate(tensors, lost, {}, budget, by) for by in (None, measure))
    others = sum(tensor.nbytes for name, tensor in tensors.items() if name not in lost)
    options = {n: [Option(t, size_of(tensors[n], t), harm) for t, harm in types.items()] for n, types in true.items()}
    known = sum(option.harm for option in choose(options, budget - others).values())
    of_blind, of_found = (sum(true[name][each.types[name]] for name in lost) for each in (blind, found))
    assert known < 0.8 * of_blind and of_found < known + 0.08 * (of_blind - known)
    assert found.of_foretold > found.of_noise and found.nbytes <= budget


def test_another_ones_choice_stays_where_it_is_measured_to_be_best(half, lost):
    tensors = open_gguf(half).tensors
    budget = int(0.36 * sum(t.nbytes for t in tensors.values()))
    theirs = {name: min(types, key=lambda type: size_of(tensors[name], type)) for name, types in lost.items()}
    theirs = {name: type for name, type in theirs.items() if len(lost[name]) > 1}
    left = {name: tensor.type for name, tensor in tensors.items()}

    def measure(types):
        return 0.001 if types == left | theirs else 1.0

    found = allocate(tensors, lost, {}, budget, measure, {"theirs": theirs})
    assert {name: found.types[name] for name in theirs} == theirs


@pytest.mark.parametrize("seed", range(5))
def test_harms_are_foretold_as_conditioning_all_factors_at_once_does(seed):
    """The oracle holds the covariance of every tensor's and type's factor, and conditions it on the divergences."""
    random = np.random.default_rng(seed)
    names, kinds = [f"blk.{n}.ffn_up.weight" for n in range(6)], (T.Q4_0, T.Q5_0, T.Q8_0)
    lost = {name: {type: float(random.uniform(0.1, 1)) for type in kinds} for name in names}
    weight = {name: float(random.uniform(0.5, 2)) for name in names}
    points = []
    for _ in range(4):
        types = {name: kinds[random.integers(3)] for name in names if random.random() < 0.7}
        points.append(Point("", types, 0.0, float(random.uniform(0.5, 1.5)) * len(types)))
    pairs = [(name, type) for name in names for type in kinds]
    thought = np.array([weight[n] * lost[n][t] for n, t in pairs])
    factors = np.array(
        [[OF_TENSOR**2 * (a == b) + OF_TYPE**2 * ((a, s) == (b, t)) for b, t in pairs] for a, s in pairs]
    )
    covariance = factors * np.outer(thought, thought)
    seen = np.array([[point.types.get(name) == type for name, type in pairs] for point in points], float)
    measured = np.array([point.divergence for point in points])
    gain = covariance @ seen.T @ np.linalg.inv(seen @ covariance @ seen.T + np.diag((MEASURED * measured) ** 2))
    wanted = np.maximum(thought + gain @ (measured - seen @ thought), 0.1 * thought)
    found = foretold(lost, weight, points)
    assert [found[n][t] for n, t in pairs] == pytest.approx(wanted.tolist(), rel=1e-9)


def test_rank_correlation_is_spearmans():
    pairs = list(zip([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], strict=True))
    assert correlation(pairs) == pytest.approx(0.8207826817)  # 1 pair of equals: Pearson of ranks
    assert correlation(pairs[:2]) is None and correlation([(1, 2), (1, 3), (1, 4)]) is None


def test_a_trial_is_measured_once_kept_and_taken_away(half, tmp_path):
    plan = planned(half, tmp_path / "q.gguf", mixture("Q4_0"))
    types = {n: t.type for n, t in plan.gguf.tensors.items()}
    rounded = types | {"blk.0.ffn_up.weight": T.Q4_0, "blk.1.ffn_up.weight": T.Q4_0}
    with Divergence(plan, CALIBRATION, 60) as measure:
        assert 0 <= measure(types) < 1e-7
        found = measure(rounded)
        assert found > 0 and found > measure(rounded | {"blk.0.ffn_up.weight": types["blk.0.ffn_up.weight"]})
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf.measured.json"]
    with Divergence(plan, CALIBRATION, 0) as later:
        assert later(rounded) == found and later.original is None
        assert later(types | {"blk.2.ffn_up.weight": T.Q4_0}) is None, "no time was given"
    other = planned(shipped("tiny"), tmp_path / "q.gguf", mixture("Q8_0"))
    with Divergence(other, CALIBRATION, 0) as of_another:
        assert not of_another.known
    (tmp_path / "q.gguf.measured.json").write_text("{")
    with Divergence(plan, CALIBRATION, 0) as broken:
        assert not broken.known


# -- The recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [("12GB", 12 * 10**9), ("900mb", 9 * 10**8), ("7.5GiB", int(7.5 * 2**30)), ("64 KB", 64000), ("2G", 2 * 10**9)],
)
def test_sizes_are_read(text, wanted):
    assert size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12TB", "0", "1e9", "12 G B"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(Gemma4qError, match=r"is no size: 12GB, 900MB and 7\.5GiB are"):
        size(text)


def test_a_recipe_takes_no_more_bytes_than_its_mixture_and_does_less_harm(half, tmp_path, lost):
    words = Overrides(embedding=T.Q8_0, patterns=(pattern("inp_gate=q8_0"), pattern(r"\.proj=q8_0")))
    base = planned(half, tmp_path / "q.gguf", mixture("Q5_0"), words)
    wanted = recipe(base, words, None, False)
    plan, found = wanted.choose(wanted.errors(2, candidates=OLD))
    assert sum(c.data.nbytes for c in plan.changes) == found.nbytes <= sum(c.data.nbytes for c in base.changes)
    theirs = {c.tensor.name: lost[c.tensor.name].get(c.type, 0) for c in base.changes if c.tensor.name in lost}
    assert found.harm < sum(USUAL.get(part(name), 1) * noise for name, noise in theirs.items())
    types = {c.tensor.name: c.type for c in plan.changes}
    assert types["token_embd.weight"] == types["per_layer_token_embd.weight"] == T.Q8_0, "a person's word"
    plan.write()
    open_model(tmp_path / "q.gguf")
    metadata = open_gguf(tmp_path / "q.gguf").metadata
    assert metadata["gemma4q.recipe"] == "gemma"


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("gemma4q.quantize.recipe.Recipe.errors.__defaults__", (lambda done, total: None, OLD))
        with pytest.raises(SystemExit) as ended:
            cli(["quantize", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("target", [2_000_000, 2_500_000])
def test_a_file_of_a_size_is_no_larger_and_hardly_smaller(half, tmp_path, run, target):
    code, _, said = run(half, tmp_path, "--target-size", f"{target / 1e6}MB", "--budget", 0)
    (written,) = tmp_path.glob("*.gguf")
    assert code == 0 and written.name == f"tiny-{target / 1e6}MB.gguf"
    assert target - 60_000 < written.stat().st_size <= target
    assert "types were chosen by the sums of errors alone" in said
    open_model(written)


def test_what_was_measured_is_said_and_a_dry_run_uses_it(half, tmp_path, run, monkeypatch):
    monkeypatch.setattr("gemma4q.quantize.allocate.MOST_MEASURED", 4)
    first = run(half, tmp_path / "q.gguf", "Q5_1", "--recipe", "gemma", "--json")
    assert first[0] == 0 and "rank correlation of noise with KL divergence: " in first[2]
    found = json.loads(first[1])
    assert len(found["measured"]) == 4 and found["type"] == "Q5_1-gemma"
    assert -1 <= found["rank_correlation"]["noise"] <= 1 and found["rank_correlation"]["foretold"] is None
    again = json.loads(run(half, tmp_path / "q.gguf", "Q5_1", "--recipe", "gemma", "--json", "--dry-run")[1])
    assert again["tensors"] == found["tensors"] and again["measured"] == found["measured"]


def test_trials_that_a_disk_does_not_hold_are_said_at_once_and_leave_nothing(half, tmp_path, run, monkeypatch):
    monkeypatch.setattr("gemma4q.measure.sensitivity.Divergence._read_original", pytest.fail)
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: type("Status", (), {"f_bavail": 3, "f_frsize": full.f_frsize}))
    code, out, said = run(half, tmp_path / "q.gguf", "Q4_0", "--recipe", "gemma")
    assert (code, out, said.count("\n")) == (1, "", 1) and not list(tmp_path.iterdir())
    assert said.startswith(f"error: no_space: to measure trial models: {tmp_path} has ")
    assert said.endswith("--budget 0 chooses without measuring\n")


def test_slips_are_one_line(half, tmp_path, run):
    out = tmp_path / "q.gguf"
    for arguments, wanted in (
        ((out, "--target-size", "12"), "bad_option: 12 bytes are less than the model's vocabulary and keys alone take"),
        ((out, "--target-size", "1MB", "--budget", 0), "bad_option: the target is too small: the smallest types take "),
        ((out, "--target-size", "big"), "bad_option: 'big' is no size"),
        ((out, "F16", "--recipe", "gemma"), "bad_option: F32, F16 and BF16 leave a recipe nothing to choose"),
    ):
        code, stdout, said = run(half, *arguments)
        assert (code, stdout, said.count("\n")) == (1, "", 1) and said.startswith(f"error: {wanted}"), said
    for arguments, wanted in (
        ((out, "Q4_0", "--target-size", "1MB"), "--target-size says how large: no TYPE beside it"),
        ((out, "Q4_0", "--recipe", "best"), "Invalid value for '--recipe'"),
        ((out, "Q4_0", "--recipe", "gemma", "--pure"), "--pure gives all matrices one type"),
        ((out, "COPY", "--recipe", "gemma"), "COPY changes no tensor"),
        ((out, "Q4_0", "--recipe-texts", "talks.jsonl"), "say --recipe or --target-size too"),
        ((), "Missing argument '[OUT] TYPE'"),
    ):
        code, stdout, said = run(half, *arguments)
        assert (code, stdout) == (2, "") and wanted in said, said
    code, _, said = run(shipped("tiny"), out, "Q8_0", "--recipe", "gemma")
    assert code == 1 and said.startswith("error: requantize: ")

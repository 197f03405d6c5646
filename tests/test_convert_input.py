"""Bad input to `gemma4q convert`: each fault is one line that names the file, key or tensor, and nothing is written."""

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_folders import INDEX, UP, WEIGHTS, edit_json, header_of, refused, write_header
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import GEMMA4Q

from gemma4q import Gemma4qError
from gemma4q.convert.convert import planned

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import tiny_hf

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_hf.make("31b", tmp_path / "hf")


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Writes the 31b's tensors (F32) anew after a change."""
    tensors = {name: tiny_hf.random(name, dims) for name, dims in tiny_hf.contents("31b")[1]}
    change(tensors)
    entries = [(name, value.shape, "F32") for name, value in tensors.items()]
    (folder / WEIGHTS).write_bytes(
        tiny_hf.header(entries) + b"".join(v.astype("<f4").tobytes() for v in tensors.values())
    )


# -- Directories -----------------------------------------------------------------------------------


def test_what_is_no_model_directory_is_said(folder, tmp_path):
    assert refused(tmp_path / "none") == f"not_found: {tmp_path / 'none'} does not exist"
    assert refused(folder / "config.json").startswith("not_a_directory: ")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "its weights are PyTorch files" in refused(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_lora_adapter_is_refused_in_clear_words(folder, name):
    (folder / name).write_text("{}")
    assert refused(folder).startswith(f"lora: {folder} holds a LoRA adapter ({name}), not a model: merge it")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), "bad_arch: {} is a LlamaForCausalLM; converted are "),
        (lambda c: c.pop("architectures"), "bad_arch: {} names no architecture"),
        (lambda c: c.update(architectures="x"), "bad_arch: {} names no architecture"),
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quantised: {} holds quantised weights"),
        (lambda c: c.update(text_config=[]), "bad_config: {}/config.json: text_config is not an object"),
        (lambda c: c["text_config"].pop("hidden_size"), "bad_config: {}/config.json: hidden_size is missing"),
        (lambda c: c["text_config"].update(head_dim="x"), "bad_config: {}/config.json: head_dim is 'x'"),
        (
            lambda c: c["text_config"].update(num_hidden_layers=10**9),
            "bad_config: {}/config.json: num_hidden",
        ),
        (lambda c: c["text_config"].update(layer_types=["full_attention"]), "bad_config: {}/config.json: layer_types"),
        (lambda c: c["text_config"].update(rope_parameters=3), "bad_config: {}/config.json: rope_parameters.full"),
        (lambda c: c["text_config"].update(num_kv_shared_layers=-1), "bad_config: {}/config.json: num_kv_shared"),
        (lambda c: c["text_config"].update(num_attention_heads=7), "bad_hparam: gemma4.attention.head_count_kv"),
        (lambda c: c["text_config"].update(rms_norm_eps=7), "bad_hparam: gemma4.attention.layer_norm_rms_epsilon is 7"),
        (lambda c: c["text_config"].update(use_bidirectional_attention="all"), "bad_arch: {} is an embedding model"),
    ],
)
def test_a_config_that_is_no_gemma_4_is_said(folder, change, said):
    edit_json(folder / "config.json", change)
    assert refused(folder).startswith(said.format(folder))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bad_json: "),
        ("[1]", "bad_json: {} is not a JSON object"),
        ("[" * 100_000, "bad_json: {} is nested too deeply"),
        ('{"a": 1, "a": 2}', "bad_json: {}: 'a' appears twice"),
        ("{" + "9" * 5000 + "}", "bad_json: "),
        (b"\xff\xfe{", "bad_string: {} is not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_cannot_be_read_is_said(folder, name, text, said):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    assert refused(folder).startswith(said.format(folder / name))


ODD = (None, -1, 0, 10**30, 1.5, "x", [], {}, True, math.nan, math.inf, "\ud800", [[]], [1], {"a": 1}, 2**31, "a/b")
PLACES = {
    "e2b": ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    "12b": ("config.json", "processor_config.json", "generation_config.json"),
    "26b": ("config.json", INDEX),
    "31b": ("config.json",),
    "e2b-assistant": ("config.json",),
}


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> dict[str, Path]:
    return {kind: tiny_hf.make(kind, tmp_path_factory.mktemp("every") / kind) for kind in PLACES}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_odd_value_in_any_file_makes_anything_but_an_error(data, every):
    kind = data.draw(st.sampled_from(sorted(every)))
    path = every[kind] / data.draw(st.sampled_from(PLACES[kind]))
    text = path.read_text()
    place = whole = json.loads(text)
    while True:
        key = data.draw(st.sampled_from(sorted(place)[:60] if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from(ODD))
    path.write_text(json.dumps(whole))
    try:
        with planned(every[kind], every[kind].parent / "out.gguf", mmproj=data.draw(st.booleans())) as conversion:
            assert conversion.nbytes > 0
    except Gemma4qError as error:
        assert "\n" not in str(error)
    finally:
        path.write_text(text)


# -- Tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"].update(type="Unigram"), "it is no byte pair encoding"),
        (lambda t: t["model"].pop("merges"), "vocab, merges or added_tokens are missing"),
        (lambda t: t["model"]["vocab"].update(new=10**9), "token 'new' has the id 1000000000"),
        (lambda t: t["model"]["vocab"].update(new="x"), "token 'new' has the id 'x'"),
        (lambda t: t["model"]["merges"].append(["a"]), "merge \"['a']\" is not two pieces"),
        (lambda t: t["added_tokens"].append({"id": 7, "content": "<pad>"}), "'<pad>' has the ids 0 and 7"),
        (lambda t: t["added_tokens"].append(5), "an added token has no content"),
    ],
)
def test_a_tokenizer_that_is_not_gemmas_is_said(folder, change, said):
    edit_json(folder / "tokenizer.json", change)
    assert refused(folder).startswith(f"bad_tokenizer: {folder / 'tokenizer.json'}: {said}")


def test_a_directory_without_tokenizer_is_said(folder):
    (folder / "tokenizer.json").unlink()
    assert refused(folder) == f"not_found: {folder} has neither tokenizer.json nor tokenizer.model"


def test_more_tokens_than_rows_are_said(folder):
    vocab = {f"t{i}": 512 + i for i in range(3)}
    edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(vocab))
    assert refused(folder) == "shape_mismatch: embed_tokens.weight has 512 rows for 515 tokens"


# -- Tensors ---------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named_as_the_checkpoint_names_it(folder):
    rewrite(folder, lambda t: t.pop(UP))
    assert refused(folder) == f"missing_tensor: layers.1.mlp.up_proj.weight is not in {folder}"


def test_how_many_more_are_missing_is_said(folder):
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp" in name])
    assert refused(folder).endswith(f"is not in {folder}; 2 more faults")


@pytest.mark.parametrize("name", ["layers.0.layer_scalar", "layers.0.self_attn.v_proj.weight", "norm.weight"])
def test_no_tensor_of_a_checkpoint_can_be_missed(folder, name):
    rewrite(folder, lambda t: t.pop(f"model.language_model.{name}"))
    assert refused(folder).startswith(f"missing_tensor: {name} is not in ")


def test_an_extra_tensor_is_named(folder):
    rewrite(folder, lambda t: t.update({"model.language_model.layers.1.mlp.lora.weight": np.ones((2, 2), "f4")}))
    said = "extra_tensor: model.language_model.layers.1.mlp.lora.weight (model.safetensors) belongs to no Gemma 4 model"
    assert refused(folder) == said
    rewrite(folder, lambda t: t.update({UP.replace("1", "9"): np.ones((128, 64), "f4")}))
    assert refused(folder).startswith(
        "extra_tensor: layers.9.mlp.up_proj.weight has no place in a model of this config"
    )


def test_a_tensor_of_another_shape_is_named(folder):
    rewrite(folder, lambda t: t.update({UP: t[UP].T}))
    said = "shape_mismatch: layers.1.mlp.up_proj.weight has shape [64, 128]; want [128, 64]"
    assert refused(folder) == said


def test_the_same_tensor_under_two_prefixes_is_said(folder):
    rewrite(folder, lambda t: t.update({UP.replace("language_model.", ""): t[UP]}))
    assert "are the same tensor" in refused(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("outtype", ["f32", "bf16", "f16", "q8_0"])
def test_a_value_that_is_not_finite_is_named_with_its_place(folder, value, outtype):
    def put(tensors):
        tensors[UP][3, 5] = value

    rewrite(folder, put)
    said = f"numeric: {UP} holds NaNs or infinities: the first is {value} at position {3 * 64 + 5}"
    assert refused(folder, outtype=outtype) == said


def test_a_value_too_large_for_the_type_is_named(folder):
    def put(tensors):
        tensors[UP][0, 0] = 70000

    rewrite(folder, put)
    assert refused(folder, outtype="f16") == f"numeric: {UP} holds 70000, too large for F16: use --outtype bf16"
    with planned(folder, folder.parent / "out.gguf", "bf16") as conversion:
        conversion.write()


def test_infinite_ranges_of_clipped_layers_are_kept_but_nan_is_not(tmp_path):
    folder = tiny_hf.make("e2b", tmp_path / "hf")
    with planned(folder, tmp_path / "out.gguf", mmproj=True) as conversion:
        conversion.write()
    path = folder / WEIGHTS
    header, data = header_of(path)
    name = "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    at = header[name]["data_offsets"][0]
    write_header(path, header, data[:at] + b"\xc0\x7f" + data[at + 2 :])
    (tmp_path / "out.gguf").unlink()
    assert refused(folder, mmproj=True).startswith(f"numeric: {name} holds NaNs")


def test_faults_of_encoders_are_named(tmp_path):
    folder = tiny_hf.make("e2b", tmp_path / "hf")
    edit_json(folder / "config.json", lambda c: c["vision_config"].update(hidden_size=96))
    assert "patch_embedder.input_proj.weight has shape [64, 48]; want [96, 48]" in refused(folder, mmproj=True)
    edit_json(folder / "config.json", lambda c: c["vision_config"].update(hidden_size=64, num_hidden_layers=3))
    name = "model.vision_tower.encoder.layers.2.input_layernorm.weight"
    assert refused(folder, mmproj=True) == f"missing_tensor: {name} is not in {folder}"
    edit_json(folder / "config.json", lambda c: c["vision_config"].update(num_hidden_layers=1))
    assert refused(folder, mmproj=True).startswith("extra_tensor: model.vision_tower.encoder.layers.1.")
    edit_json(folder / "config.json", lambda c: c.update(vision_config=None))
    assert refused(folder, mmproj=True).startswith("no_encoder: ")
    assert "is an assistant" in refused(tiny_hf.make("e2b-assistant", tmp_path / "a"), mmproj=True)


@pytest.mark.parametrize("change", ["missing", "shape", "order"])
def test_faults_of_a_clustered_head_are_named(tmp_path, change):
    folder = tiny_hf.make("e2b-assistant", tmp_path / "hf")
    header, data = header_of(folder / WEIGHTS)
    name = "masked_embedding.token_ordering"
    if change == "missing":
        edit_json(folder / "config.json", lambda c: c.update(num_centroids=17))
        assert "masked_embedding.centroids.weight has shape [16, 32]; want [17, 32]" in refused(folder)
    elif change == "shape":
        header[name]["shape"] = [256, 2]
        write_header(folder / WEIGHTS, header, data)
        assert f"{name} has shape [256, 2]; want [512]" in refused(folder)
    else:
        at = header[name]["data_offsets"][0]
        write_header(folder / WEIGHTS, header, data[:at] + data[at + 8 : at + 16] + data[at + 8 :])
        assert f"{name} does not hold each of 0 to 511 once" in refused(folder)


# -- The command -----------------------------------------------------------------------------------


def run(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess:
    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [*GEMMA4Q, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)


def test_the_command_says_one_line_and_exits_with_1(folder, tmp_path):
    done = run("convert", tmp_path / "none")
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        f"error: not_found: {tmp_path / 'none'} does not exist\n",
    )
    assert run("convert", folder, "--outtype", "q3").returncode == 2
    assert run("convert", folder, "--max-part-size", "0").returncode == 2
    assert run("convert", folder, "--max-part-size", "2T").returncode == 2


def test_a_dry_run_says_what_would_be_written(folder, tmp_path):
    done = run("convert", folder, "-o", tmp_path / "out.gguf", "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "out.gguf").exists()
    assert done.stdout.startswith(f"{tmp_path / 'out.gguf'}  30 tensors")
    assert done.stderr == "nothing was written (--dry-run)\n"
    described = json.loads(run("convert", folder, "-o", tmp_path / "out.gguf", "--dry-run", "--json").stdout)
    assert described["written"] is False and described["files"][0]["tensors"] == 30


def test_an_output_that_cannot_be_is_said_before_anything_is_made(folder, tmp_path):
    assert refused(folder, tmp_path / "no/out.gguf") == f"not_found: {tmp_path / 'no'}: there is no such directory"
    assert refused(folder, Path("/dev/null")).startswith("not_a_file: ")
    assert refused(folder, folder / WEIGHTS).startswith("same_file: ")
    (tmp_path / "link.gguf").symlink_to(folder / WEIGHTS)
    assert refused(folder, tmp_path / "link.gguf").startswith("same_file: ")
    assert refused(folder, folder / "config.json").startswith(
        f"not_gguf: {folder / 'config.json'} exists and is no GGUF"
    )
    assert refused(folder, Path("/sys/out.gguf")).startswith("not_writable: ")


def test_a_full_disk_is_said_and_leaves_nothing(folder, tmp_path, monkeypatch):
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: type("Status", (), {"f_bavail": 3, "f_frsize": full.f_frsize}))
    assert refused(folder).startswith(f"no_space: {tmp_path} has {3 * full.f_frsize:,} bytes free; ")
    done = run("convert", folder, "-o", tmp_path / "out.gguf", limit=50_000)
    assert done.returncode == 1 and done.stderr.startswith("error: no_space: ")
    assert not list(tmp_path.glob("out*"))

"""`gemma4q convert`: every tensor and every key is what llama.cpp's converter writes, and what is written runs.

tests/data/convert.json holds digests of what that converter made of the tiny directories that tools/tiny_hf.py makes;
tools/convert_oracle.py makes it anew.
"""

import json
import lzma
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import vocab
from terminal import GEMMA4Q

import gemma4q
from gemma4q.abi import TensorType
from gemma4q.convert.card import file_name, name_parts, read_card, size_label
from gemma4q.convert.convert import planned
from gemma4q.convert.softplus import softplus
from gemma4q.convert.tokenizer import derived_merges, tokenizer_keys
from gemma4q.gguf.quants import dequantize
from gemma4q.gguf.reader import GGUF, open_gguf
from gemma4q.model import open_model
from gemma4q.model.check import check

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import convert_oracle
import shapes
import tiny_hf

EXPECTED = json.loads((Path(__file__).parent / "data/convert.json").read_text())
# Keys that may differ from llama.cpp's, and why. None does on these directories; elsewhere tokenizer.ggml.token_type
# can: a token that tokenizer.json calls special is control here, there only if tokenizer_config.json names it too.
UNLIKE: dict[str, str] = {}
# Tensors that llama.cpp's converter drops, and we keep.
KEPT = {"e2b-assistant": {"masked_embd_centroids.weight", "masked_embd_ordering"}}
JOBS = [convert_oracle.job_name(*job) for job in convert_oracle.JOBS]


pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: tiny_hf.make(kind, tmp_path_factory.mktemp("hf") / kind) for kind in tiny_hf.KINDS}


def convert(folder: Path, out: Path, outtype: str = "auto", **options) -> GGUF:
    with planned(folder, out, outtype, **options) as conversion:
        conversion.write()
    return open_gguf(conversion.files[0].path)


def expected(job: str, sort: str, outtype: str) -> dict[str, str]:
    """What llama.cpp wrote: a word where all types agree, else one for each."""
    words = {name: v if isinstance(v, str) else v.get(outtype) for name, v in EXPECTED[job][sort].items()}
    return {name: word for name, word in words.items() if word is not None}


@pytest.mark.parametrize("outtype", convert_oracle.OUTTYPES)
@pytest.mark.parametrize("job", JOBS)
def test_tensors_and_metadata_are_those_of_llama_cpp(job, outtype, folders, tmp_path):
    mmproj = job.startswith("mmproj-")
    ours = convert_oracle.described(
        convert(folders[job.removeprefix("mmproj-")], tmp_path / "out.gguf", outtype, mmproj=mmproj)
    )
    assert ours["tensors"].keys() - expected(job, "tensors", outtype).keys() == KEPT.get(job, set())
    for name, word in expected(job, "tensors", outtype).items():
        assert ours["tensors"][name] == word, name
    theirs = expected(job, "metadata", outtype)
    for key in theirs.keys() | ours["metadata"].keys():
        assert key in UNLIKE or ours["metadata"].get(key) == theirs.get(key), key


@pytest.mark.parametrize("kind", tiny_hf.TINY)
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_what_is_written_is_sound_and_runs(kind, outtype, folders, tmp_path):
    path = convert(folders[kind], tmp_path / "out.gguf", outtype).path
    assert not [finding for finding in check(path) if finding.level == "error"]
    with gemma4q.load(path, context=64, threads=1) as model:
        logits = model.logits([2, 300, 301, 302])
        assert np.isfinite(logits).all() and logits.std() > 0.01
        assert model.generate("Hello", max_tokens=4).text() is not None


@pytest.mark.parametrize("kind", tiny_hf.ASSISTANTS)
def test_assistants_are_drafters_to_the_engine(kind, folders, tmp_path):
    path = convert(folders[kind], tmp_path / "out.gguf").path
    _, config, weights = open_model(path)
    assert config.target_width == tiny_hf.TINY[tiny_hf.ASSISTANTS[kind]].hidden
    assert set(weights.ignored) == KEPT.get(kind, set())


def test_an_assistants_centroids_are_its_checkpoints_and_can_be_left_out(folders, tmp_path):
    gguf = convert(folders["e2b-assistant"], tmp_path / "out.gguf", "f32")
    order = gguf.tensors["masked_embd_ordering"].data.view("<i4")
    assert sorted(order) == list(range(512)) and list(order) != sorted(order)
    name = "masked_embedding.centroids.weight"
    values = dequantize(gguf.tensors["masked_embd_centroids.weight"].data, TensorType.F32)
    stored = tiny_hf.stored(tiny_hf.random(name, (16, 32)), "BF16")
    assert (np.frombuffer(stored, "<u2") == values.view("<u4").reshape(-1) >> 16).all()
    without = convert(folders["e2b-assistant"], tmp_path / "less.gguf", "f32", centroids=False)
    assert gguf.tensors.keys() - without.tensors.keys() == KEPT["e2b-assistant"]


def test_the_range_of_a_clipped_layer_may_be_a_number_or_a_list_of_one(tmp_path):
    folder = tiny_hf.make("e2b", tmp_path / "hf")
    before = convert_oracle.described(convert(folder, tmp_path / "a.gguf", mmproj=True))
    entries = [(name, dims or (1,)) for name, dims in tiny_hf.contents("e2b")[1]]
    tiny_hf.write_tensors(folder, entries, "BF16")
    assert convert_oracle.described(convert(folder, tmp_path / "b.gguf", mmproj=True)) == before


def test_rows_that_no_token_has_are_left_out(folders, tmp_path):
    shape = replace(tiny_hf.TINY["31b"], vocab=640)
    folder = tiny_hf.make("31b", tmp_path / "hf")
    tiny_hf.write_tensors(folder, list(tiny_hf.text_tensors(shape, "model.")), "F32")
    table = convert(folder, tmp_path / "out.gguf", "f32").tensors["token_embd.weight"]
    assert table.shape == (512, 64)


def test_a_text_model_by_itself_is_converted_too(tmp_path):
    folder = tiny_hf.make("31b", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    flat = config["text_config"] | {"architectures": ["Gemma4ForCausalLM"]}
    tiny_hf.write_json(folder / "config.json", flat)
    tiny_hf.write_tensors(folder, list(tiny_hf.text_tensors(tiny_hf.TINY["31b"], "model.")), "F32")
    theirs = expected("31b", "tensors", "f16")
    assert convert_oracle.described(convert(folder, tmp_path / "o.gguf", "f16"))["tensors"].keys() == theirs.keys()


def test_an_untied_head_becomes_output(tmp_path):
    folder = tiny_hf.make("12b", tmp_path / "hf")
    entries = [*tiny_hf.contents("12b")[1], ("lm_head.weight", (512, 64))]
    tiny_hf.write_tensors(folder, entries, "BF16")
    assert convert(folder, tmp_path / "o.gguf").tensors["output.weight"].shape == (512, 64)


def test_auto_takes_the_checkpoints_own_type(folders):
    for kind, outtype in {"e2b": "bf16", "e4b": "f16", "31b": "f16"}.items():
        with planned(folders[kind]) as conversion:
            assert conversion.outtype == outtype


def test_nothing_is_written_before_write(folders, tmp_path):
    with planned(folders["e2b"], tmp_path / "out.gguf") as conversion:
        assert conversion.nbytes > 500_000
    assert not list(tmp_path.iterdir())


def test_the_outputs_name_follows_the_directory_and_the_type(folders, tmp_path):
    with planned(folders["26b"], tmp_path / "a-{ftype}-{FTYPE}.gguf", "q8_0") as conversion:
        assert conversion.files[0].path.name == "a-q8_0-Q8_0.gguf"
    with planned(folders["26b"], tmp_path, "q8_0", mmproj=True) as conversion:
        assert conversion.files[0].path == tmp_path / "mmproj-26b-26b-Q8_0.gguf"
    keys = {"general.name": "Gemma 4", "general.basename": "gemma-4", "general.size_label": "26B-A4B"}
    assert file_name(keys | {"general.finetune": "it"}, "bf16", False) == "gemma-4-26B-A4B-it-BF16.gguf"


@pytest.mark.parametrize(
    ("name", "parameters", "parts"),
    [
        ("google/gemma-4-E2B-it", 4_600_000_000, "google"),
        ("gemma-4-26B-A4B-it", 25_000_000_000, "gemma-4 it 26B-A4B"),
        ("gemma-4-26B-A4B-it", 1_000_000, "gemma-4 26b-it A4B"),
        ("gemma-4-31B", 30_000_000_000, "gemma-4 31B"),
        ("gemma", 1, ""),
        ("gemma-4", 1, "gemma 4"),
        ("tiny-random-v2-8k-chat", 100, "tiny-random-v2 8k-chat"),
    ],
)
def test_names_say_what_they_say_to_llama_cpp(name, parameters, parts):
    found = name_parts(name, parameters)
    order = ("organization", "basename", "finetune", "size_label", "version")
    assert " ".join(found[key] for key in order if key in found) == parts


def test_sizes_are_labelled_in_two_digits():
    labels = [size_label(count, 0, 0) for count in (512, 64_100, 4_648_000_000, 30_697_000_000, 2 * 10**12)]
    assert labels == ["0.5K", "64K", "4.6B", "31B", "2.0T"]
    assert size_label(25_233_000_000, 22_838_000_000, 128) == "128x2.6B"


def test_a_model_cards_head_is_read_and_nothing_else(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(
        '---\nlicense: "gemma"\ntags: [a, "b c"]\nlanguage: # two\n- en\n  - de\nempty:\n---\nlicense: mit\n'
    )
    assert read_card(card) == {"license": "gemma", "tags": ["a", "b c"], "language": ["en", "de"], "empty": []}
    card.write_text("# No head\nlicense: mit\n")
    assert read_card(card) == {}


def test_the_softplus_is_the_logarithm_of_one_and_e_to_the_x():
    x = np.concatenate([np.linspace(-120, 40, 20_001), [0, -0.0, 20, 1e30, -1e30]]).astype("f4")
    exact = np.logaddexp(0, x.astype("f8"))
    assert (np.abs(softplus(x) - exact) <= 2 * np.spacing(exact.astype("f4"))).all()


def test_tokens_types_and_template_come_from_the_tokenizer(folders, tmp_path):
    metadata = convert(folders["e2b"], tmp_path / "o.gguf").metadata
    tokens = [token.decode() for token in metadata["tokenizer.ggml.tokens"]]
    types = dict(zip(tokens, metadata["tokenizer.ggml.token_type"].tolist(), strict=True))
    wanted = {"<|turn>": 3, "<|channel>": 4, "<|tool_response>": 4, '<|"|>': 4, "<0x41>": 6, "<pad>": 3, "e": 1}
    assert {token: types[token] for token in wanted} == wanted
    assert metadata["tokenizer.chat_template"] == tiny_hf.TEMPLATE
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.sampling.top_k"] == 64


def test_a_token_that_is_special_in_tokenizer_json_alone_is_control(tmp_path):
    folder = tiny_hf.make("e2b", tmp_path / "hf")
    (folder / "tokenizer_config.json").unlink()
    metadata = convert(folder, tmp_path / "o.gguf").metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    assert metadata["tokenizer.ggml.token_type"][tokens.index(b"<|image|>")] == 3
    assert metadata["tokenizer.ggml.bos_token_id"] == 2, "from config.json"


def pieces(tmp_path: Path) -> Path:
    """A SentencePiece model of Gemma's make: byte pairs with byte fallback."""
    spm = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text((Path(__file__).parents[1] / "LICENSE").read_text())
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=512, model_type="bpe",
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, character_coverage=1.0, num_threads=1,
        user_defined_symbols=["<mask>", "<|turn>", "<turn|>", "<|channel>"], minloglevel=2,
        add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return tmp_path / "tokenizer.model"


def test_a_tokenizer_model_alone_gives_the_tokens_that_sentencepiece_gives(tmp_path):
    from gemma4q.text.tokenizer import Tokenizer

    model = pieces(tmp_path)
    folder = tiny_hf.make("e2b", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model.rename(folder / "tokenizer.model")
    gguf = convert(folder, tmp_path / "out.gguf")
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_gguf(gguf)
    for text in ("You may reproduce and distribute copies", "the Licensor shall mean", "naïve 日本"):
        assert tokenizer.encode(text) == oracle.encode(text), text
    types = gguf.metadata["tokenizer.ggml.token_type"]
    assert [types[oracle.piece_to_id(piece)] for piece in ("<|turn>", "<|channel>", "<0x00>")] == [3, 4, 6]


def test_the_published_merges_follow_from_their_pieces_scores():
    published = open_gguf(vocab.gemma_vocabulary()).metadata
    tokens = [token.decode() for token in published["tokenizer.ggml.tokens"]]
    early = np.frombuffer(vocab.sections(lzma.decompress(vocab.PACK.read_bytes()[32:]))[4], np.uint32)
    scores = dict(zip(tokens, -np.arange(1.0, len(tokens) + 1), strict=True))
    scores |= {tokens[i]: 0.0 for i in sorted(early.tolist())}  # what a trainer was told to keep whole
    assert derived_merges(scores) == [merge.decode() for merge in published["tokenizer.ggml.merges"]]


def test_the_published_vocabulary_comes_out_byte_for_byte(tmp_path):
    published = open_gguf(vocab.gemma_vocabulary()).metadata
    tokens = [token.decode() for token in published["tokenizer.ggml.tokens"]]
    special = [i for i, type in enumerate(published["tokenizer.ggml.token_type"].tolist()) if type in (3, 4)]
    merges = [re.fullmatch("(.[^ ]*) (.*)", merge.decode(), re.DOTALL) for merge in published["tokenizer.ggml.merges"]]
    bpe = {"type": "BPE", "byte_fallback": True, "vocab": dict(zip(tokens, range(len(tokens)), strict=True))}
    added = [{"id": i, "content": tokens[i], "special": True} for i in special]
    whole = {"added_tokens": added, "model": bpe | {"merges": [pair.groups() for pair in merges]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    keys = tokenizer_keys(tmp_path, {})
    for name in ("tokens", "merges"):
        assert keys[f"tokenizer.ggml.{name}"].data.tobytes() == published[f"tokenizer.ggml.{name}"].data.tobytes()
    for name in ("scores", "token_type"):
        assert np.array_equal(keys[f"tokenizer.ggml.{name}"], published[f"tokenizer.ggml.{name}"])


def test_without_sentencepiece_a_tokenizer_model_says_what_to_install(tmp_path, monkeypatch):
    folder = tiny_hf.make("e2b", tmp_path / "hf")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with (
        pytest.raises(gemma4q.Gemma4qError, match=r"missing_package: .*pip install 'gemma4q\[convert\]'"),
        planned(folder),
    ):
        pass


def resident(shape: shapes.Shape, tmp_path: Path, outtype: str) -> tuple[int, int]:
    """Most bytes of RssAnon while a sparse directory is converted, and the bytes written."""
    import subprocess
    import time

    folder = tiny_hf.sparse(shape, tmp_path / "hf")
    out = tmp_path / "out.gguf"
    command = [*GEMMA4Q, "convert", str(folder), "-o", str(out), "--outtype", outtype]
    process, most = subprocess.Popen(command), 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        most = max([most, *(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon" in line)])
        time.sleep(0.05)
    assert process.wait() == 0
    size = out.stat().st_size
    out.unlink()
    return most, size


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    small = replace(shapes.SHAPES["e2b"], layers=3, period=3, shared=0, vocab=512)
    most, size = resident(small, tmp_path, "q8_0")
    assert size > 100e6
    assert most < 300e6


@pytest.mark.slow
def test_a_checkpoint_of_62_gigabytes_needs_less_than_2(tmp_path):
    most, size = resident(shapes.SHAPES["31b"], tmp_path, "q8_0")
    assert size > 30e9
    assert most < 2e9

"""A model's geometry, tensors and vocabulary are what its file says, in every dialect that files are written in."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import (
    BOOL,
    EXPERT_HIDDEN,
    EXPERTS,
    F32,
    HIDDEN,
    I32,
    LAYERS,
    PER_LAYER,
    STR,
    TOKENS,
    U32,
    WIDTH,
    WINDOW,
    Info,
    array,
    changed,
    tiny,
    vocabulary,
)  # fmt: skip
from vocab import gemma_vocabulary

from gemma4q.errors import Gemma4qError
from gemma4q.gguf.reader import open_gguf
from gemma4q.model import open_model
from gemma4q.model.check import check
from gemma4q.model.config import TARGET
from gemma4q.model.forward import build
from gemma4q.plan.builder import Rope

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import shapes


def opened(tmp_path, file):
    path = tmp_path / "model.gguf"
    path.write_bytes(file.bytes())
    return open_model(path)


def config_of(tmp_path, *changes, moe=False):
    return opened(tmp_path, changed(*changes, moe=moe))[1]


class TestGeometry:
    def test_the_tiny_model_is_read_as_it_was_made(self, tmp_path):
        config = config_of(tmp_path)
        assert (config.width, config.vocab, config.context_length, config.softcap) == (WIDTH, len(TOKENS), 256, 30.0)
        assert config.eps == pytest.approx(1e-6) and config.per_layer_width == PER_LAYER
        assert not config.bidirectional_images
        assert [layer.window for layer in config.layers] == [WINDOW, 0] * 2
        assert [layer.kv for layer in config.layers] == [0, 1, 0, 1]
        assert [layer.head_dim for layer in config.layers] == [16, 32] * 2
        assert config.layers[0].rope == Rope(1e4, 16, 8)
        assert config.layers[1].rope == Rope(1e6, 32, 4, "rope_freqs.weight")
        assert {layer.hidden for layer in config.layers} == {HIDDEN}
        assert not any(layer.experts or layer.keys_from_values for layer in config.layers)
        assert (config.donor(local=True), config.donor(local=False)) == (0, 1)

    def test_a_mixture_is_known_by_its_tensors_and_keys_stand_for_missing_values(self, tmp_path):
        config = config_of(tmp_path, moe=True)
        assert config.bidirectional_images
        assert all(layer.owns_kv for layer in config.layers)
        assert [layer.keys_from_values for layer in config.layers] == [False, True] * 2
        found = {(layer.experts, layer.experts_used, layer.expert_hidden) for layer in config.layers}
        assert found == {(EXPERTS, 2, EXPERT_HIDDEN)}

    def test_borrowing_layers_take_values_from_keys_when_their_donor_does(self, tmp_path):
        config = config_of(tmp_path, lambda file: file.tensors.pop("blk.1.attn_v.weight"))
        assert [layer.keys_from_values for layer in config.layers] == [False, True] * 2

    @pytest.mark.parametrize("key", ["feed_forward_length", "attention.head_count", "attention.head_count_kv"])
    def test_one_number_for_all_layers_is_an_array_of_it(self, tmp_path, key):
        value = {"feed_forward_length": HIDDEN, "attention.head_count": 2, "attention.head_count_kv": 1}[key]
        several = config_of(tmp_path, lambda file: file.set_array("gemma4." + key, I32, [value] * LAYERS))
        assert several == config_of(tmp_path)

    def test_the_widths_of_an_array_are_those_of_the_layers(self, tmp_path):
        file = tiny()
        file.set_array("gemma4.feed_forward_length", I32, [HIDDEN, HIDDEN, 64, 64])
        for i in (2, 3):
            for name, shape in (("gate", [64, WIDTH]), ("up", [64, WIDTH]), ("down", [WIDTH, 64])):
                info = file.tensors[f"blk.{i}.ffn_{name}.weight"]
                info.ne, info.type, info.data = shape[::-1], 0, np.ones(shape, "<f4").tobytes()
        assert [layer.hidden for layer in opened(tmp_path, file)[1].layers] == [HIDDEN, HIDDEN, 64, 64]

    def test_keys_a_file_may_leave_out(self, tmp_path):
        dropped = ("final_logit_softcapping", "attention.value_length", "rope.dimension_count", "expert_count",
                   "expert_used_count", "expert_feed_forward_length")  # fmt: skip
        file = tiny()
        for key in dropped:
            del file.keys[f"gemma4.{key}".encode()]
        assert opened(tmp_path, file)[1] == replace(config_of(tmp_path), softcap=0.0)

    def test_integers_of_any_width_are_integers(self, tmp_path):
        for type in range(13):
            if type in (0, 1, 2, 3, 4, 5, 10, 11):
                assert config_of(tmp_path, lambda file, t=type: file.set("gemma4.block_count", t, LAYERS))


# Text tensors in the published files, without and with the keys and values nobody reads; and layers with their own.
COUNTS = {"e2b": (541, 601), "e4b": (666, 720), "12b": (667, 667), "26b": (658, 658), "31b": (833, 833)}
KEY_VALUES = {"e2b": 15, "e4b": 24, "12b": 48, "26b": 30, "31b": 60}


class TestPublished:
    """Sparse files with the shapes of the five published models, from their public configs."""

    def sparse(self, path, shape):
        file, types = tiny(), shapes.tensor_types(shape, "q4_0")
        file.keys.clear()
        vocabulary(file)
        for key, value in shapes.metadata(shape).items():
            if isinstance(value, np.ndarray):
                file.set_array(key, BOOL if value.dtype == bool else I32, value.tolist())
            else:
                file.set(key, {str: STR, int: U32, float: F32}[type(value)], value)
        file.tensors.clear()
        for name, dims in shapes.tensors(shape).items():
            length = range(shapes.tensor_bytes(dims, types[name]))  # stands in for as many bytes
            file.tensors[name] = Info(name.encode(), [*dims[::-1]], int(types[name]), length)
        header, offsets = file.header()
        start = -(-len(header) // 32) * 32
        factors = np.where(np.arange(256) < 64, 1, 1e30).astype("<f4").tobytes()
        with open(path, "wb") as out:
            out.write(header)
            out.seek(start + offsets[[*file.tensors].index("rope_freqs.weight")])
            out.write(factors)
            out.truncate(start + offsets[-1] + len(file.tensors["output_norm.weight"].data))

    @pytest.mark.parametrize("dead", [False, True])
    @pytest.mark.parametrize("size", COUNTS)
    def test_its_geometry_and_tensors_are_understood(self, tmp_path, size, dead):
        published = replace(shapes.SHAPES[size], vocab=len(TOKENS), dead_kv=dead)
        self.sparse(tmp_path / "model.gguf", published)
        _, config, weights = open_model(tmp_path / "model.gguf")
        bare = COUNTS[size][0]
        assert (len(weights.tensors), len(weights.dead)) == (bare, COUNTS[size][dead] - bare)
        assert not weights.ignored
        assert len({layer.kv for layer in config.layers}) == KEY_VALUES[size]
        for layer in config.layers:
            kind = published.is_global(layer.index)
            assert (layer.window == 0) == kind and layer.head_dim == published.head_dim[kind]
            assert layer.rope.pairs == (64 if kind else 128)
            assert layer.keys_from_values == (kind and size not in ("e2b", "e4b"))
            assert layer.hidden == published.ffn_width(layer.index)
        assert build(config, weights.shapes).ops

    def test_the_donors_of_the_small_ones_are_the_published(self, tmp_path):
        for size, donors in (("e2b", (13, 14)), ("e4b", (22, 23))):
            self.sparse(tmp_path / "model.gguf", replace(shapes.SHAPES[size], vocab=len(TOKENS)))
            config = open_model(tmp_path / "model.gguf")[1]
            assert (config.donor(local=True), config.donor(local=False)) == donors


class TestDialects:
    def test_a_fused_projection_stands_for_its_three(self, tmp_path):
        file = tiny()
        rows = [file.tensors.pop(f"blk.0.attn_{name}.weight") for name in "qkv"]
        data = b"".join(info.data for info in rows)
        fused = Info(b"blk.0.attn_qkv.weight", [WIDTH, sum(i.ne[1] for i in rows)], 8, data)
        file.tensors["blk.0.attn_qkv.weight"] = fused
        _, config, weights = opened(tmp_path, file)
        assert config == config_of(tmp_path)
        assert "blk.0.attn_qkv.weight" in weights.tensors and "blk.0.attn_q.weight" not in weights.tensors
        assert build(config, weights.shapes).ops
        fused.ne[1] -= 1
        with pytest.raises(
            Gemma4qError, match=r"shape_mismatch: blk.0.attn_qkv.weight has shape \[63, 64\]; want \[64, 64\]"
        ):
            fused.data = fused.data[:-68]
            opened(tmp_path, file)

    def test_keys_and_values_of_borrowing_layers_are_left_alone(self, tmp_path):
        file = tiny()
        for name in ("k", "v"):
            file.tensors[f"x{name}"] = Info(f"blk.2.attn_{name}.weight".encode(), [256, 1], 16, bytes(66))
        _, config, weights = opened(tmp_path, file)
        assert weights.dead == ("blk.2.attn_k.weight", "blk.2.attn_v.weight")
        assert config == config_of(tmp_path)

    def test_experts_may_come_in_two_tensors(self, tmp_path):
        file = tiny(moe=True)
        whole = file.tensors.pop("blk.0.ffn_gate_up_exps.weight").data
        for name, data in (("gate", whole[: len(whole) // 2]), ("up", whole[len(whole) // 2 :])):
            info = Info(f"blk.0.ffn_{name}_exps.weight".encode(), [WIDTH, EXPERT_HIDDEN, EXPERTS], 2, data)
            file.tensors[info.name.decode()] = info
        _, config, weights = opened(tmp_path, file)
        assert {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"} <= weights.tensors.keys()
        assert config == config_of(tmp_path, moe=True)
        assert build(config, weights.shapes).ops
        del file.tensors["blk.0.ffn_up_exps.weight"]
        with pytest.raises(Gemma4qError, match=r"missing_tensor: blk.0.ffn_up_exps"):
            opened(tmp_path, file)

    def test_ollamas_name_for_the_experts_scale_is_the_same_tensor(self, tmp_path):
        file = tiny(moe=True)
        for i in range(LAYERS):
            file.tensors[f"blk.{i}.ffn_down_exps.scale"].name = f"blk.{i}.ffn_gate_inp.per_expert_scale".encode()
        weights = opened(tmp_path, file)[2]
        plain = opened(tmp_path, tiny(moe=True))[2]
        assert weights.tensors.keys() == plain.tensors.keys() and not weights.ignored

    def test_ollamas_name_for_the_tokenizer_is_the_same_tokenizer(self, tmp_path):
        def ollama(file):
            file.set("tokenizer.ggml.model", STR, "llama")
            file.set("tokenizer.ggml.pre", STR, "gemma4")

        assert config_of(tmp_path, ollama) == config_of(tmp_path)

    def test_what_is_optional_may_be_there_or_not(self, tmp_path):
        file = tiny()
        del file.tensors["blk.0.layer_output_scale.weight"]
        file.tensors["head"] = Info(
            b"output.weight", [WIDTH, len(TOKENS)], 0, np.ones((len(TOKENS), WIDTH), "<f4").tobytes()
        )
        _, config, weights = opened(tmp_path, file)
        assert "output.weight" in weights.tensors and "blk.0.layer_output_scale.weight" not in weights.tensors
        assert build(config, weights.shapes).ops

    def test_vectors_may_be_halves(self, tmp_path):
        file = tiny()
        info = file.tensors["output_norm.weight"]
        expected = np.frombuffer(info.data, "<f4").astype("<f2")
        info.type, info.data = 1, expected.tobytes()
        assert (opened(tmp_path, file)[2].vector("output_norm.weight") == expected.astype("f4")).all()

    def test_a_scale_beside_a_matrix_multiplies_what_it_gives(self, tmp_path):
        file = tiny()
        file.tensors["s"] = Info(b"blk.0.ffn_up.scale", [1], 0, np.float32(0.5).tobytes())
        file.tensors["i"] = Info(b"blk.0.ffn_up.input_scale", [1], 0, np.float32(3).tobytes())
        weights = opened(tmp_path, file)[2]
        assert weights.tensors["blk.0.ffn_up.scale"].shape == (1,)
        assert weights.ignored == ("blk.0.ffn_up.input_scale",)

    def test_unknown_tensors_are_ignored_and_named_by_check(self, tmp_path):
        file = tiny()
        file.tensors["x"] = Info(b"mtp.extra", [256, 1], 16, bytes(66))
        assert opened(tmp_path, file)[2].ignored == ("mtp.extra",)
        notes = [str(finding) for finding in check(tmp_path / "model.gguf")]
        assert len(notes) == 2 and all(note.startswith("note: ") and "mtp.extra" in note for note in notes)

    def test_an_unreadable_type_is_named_with_those_that_can_be_read(self, tmp_path):
        file = tiny()
        up = file.tensors["blk.0.ffn_up.weight"]
        up.type, up.data = 40, bytes(WIDTH * HIDDEN // 64 * 36)
        with pytest.raises(Gemma4qError, match=r"bad_tensor_type: blk.0.ffn_up.weight is NVFP4; readable are F32, F16"):
            opened(tmp_path, file)


class TestDrafter:
    TARGET_WIDTH = 96

    def drafter(self):
        file = tiny()
        for key in [key for key in file.keys if key.startswith(b"gemma4.")]:
            file.keys[key.replace(b"gemma4.", b"gemma4-assistant.")] = file.keys.pop(key)
        file.set("general.architecture", STR, "gemma4-assistant")
        file.set("gemma4-assistant.attention.shared_kv_layers", U32, LAYERS)
        file.set("gemma4-assistant.embedding_length_per_layer_input", U32, 0)
        file.set("gemma4-assistant.embedding_length_out", U32, self.TARGET_WIDTH)
        file.set("gemma4-assistant.nextn_predict_layers", U32, LAYERS)
        unused = ("attn_k", "attn_v", "inp_gate", "proj", "post_norm", "per_layer")
        for name in [name for name in file.tensors if any(f".{word}" in "." + name for word in unused)]:
            del file.tensors[name]
        for name, shape in (("pre", [WIDTH, 2 * self.TARGET_WIDTH]), ("post", [self.TARGET_WIDTH, WIDTH])):
            full = f"nextn.{name}_projection.weight"
            file.tensors[full] = Info(full.encode(), shape[::-1], 0, np.ones(shape, "<f4").tobytes())
        return file

    def test_it_has_no_keys_of_its_own_and_knows_its_targets_width(self, tmp_path):
        _, config, weights = opened(tmp_path, self.drafter())
        assert config.target_width == self.TARGET_WIDTH
        assert {layer.kv for layer in config.layers} == {TARGET}
        assert not any(layer.owns_kv or layer.keys_from_values for layer in config.layers)
        assert weights.tensors["nextn.pre_projection.weight"].shape == (WIDTH, 2 * self.TARGET_WIDTH)

    def test_its_centroids_are_tolerated(self, tmp_path):
        file = self.drafter()
        file.tensors["c"] = Info(b"masked_embd_centroids.weight", [WIDTH, 2], 0, bytes(8 * WIDTH))
        assert opened(tmp_path, file)[2].ignored == ("masked_embd_centroids.weight",)

    def test_it_is_refused_without_what_makes_it_one(self, tmp_path):
        for key, kind in (("embedding_length_out", "missing_key"), ("attention.shared_kv_layers", "bad_hparam")):
            file = self.drafter()
            del file.keys[f"gemma4-assistant.{key}".encode()]
            with pytest.raises(Gemma4qError, match=kind):
                opened(tmp_path, file)
        file = self.drafter()
        del file.tensors["nextn.post_projection.weight"]
        with pytest.raises(Gemma4qError, match=r"missing_tensor: nextn.post_projection"):
            opened(tmp_path, file)


class TestVocabulary:
    def test_a_vocabulary_alone_opens_but_is_no_model(self):
        gguf = open_gguf(gemma_vocabulary())
        assert len(gguf.metadata["tokenizer.ggml.tokens"]) == 262_144 and not gguf.tensors
        with pytest.raises(Gemma4qError, match="missing_tensor: the file holds no tensors: it is a vocabulary"):
            open_model(gguf.path)
        assert [finding.kind for finding in check(gguf.path)] == ["missing_tensor"]

    def test_ids_may_be_left_out_where_tokens_are_named_so(self, tmp_path):
        file = tiny()
        for role in ("bos", "eos", "unknown", "padding", "mask"):
            del file.keys[f"tokenizer.ggml.{role}_token_id".encode()]
        del file.keys[b"tokenizer.ggml.token_type"], file.keys[b"tokenizer.ggml.scores"]
        assert opened(tmp_path, file)

    def test_all_faults_are_reported_at_once(self, tmp_path):
        file = tiny()
        file.set("gemma4.attention.layer_norm_rms_epsilon", F32, -1)
        file.set("gemma4.rope.freq_base", STR, "x")
        file.keys[b"tokenizer.ggml.merges"] = (9, array(I32, [1]))
        file.set("tokenizer.ggml.bos_token_id", U32, 10**6)
        data = bytearray(file.tensors["output_norm.weight"].data)
        data[:4] = np.float32(np.nan).tobytes()
        file.tensors["output_norm.weight"].data = bytes(data)
        (tmp_path / "model.gguf").write_bytes(file.bytes())
        kinds = sorted(finding.kind for finding in check(tmp_path / "model.gguf"))
        assert kinds == ["bad_hparam", "bad_tokenizer", "bad_type", "bad_type", "numeric"]


class TestNumbers:
    def test_matrices_of_zeros_are_odd_but_no_fault(self, tmp_path):
        file = tiny()
        for name in (
            "blk.0.attn_q.weight",
            "blk.0.ffn_down.weight",
            "blk.0.inp_gate.weight",
            "per_layer_model_proj.weight",
        ):
            file.tensors[name].data = bytes(len(file.tensors[name].data))
        zero = file.tensors["blk.1.ffn_up.weight"]  # the quants of a zero block need not be zero
        zero.data = (b"\0\0" + b"\x88" * 16) * (len(zero.data) // 18)
        (tmp_path / "model.gguf").write_bytes(file.bytes())
        found = list(check(tmp_path / "model.gguf"))
        assert {(finding.level, finding.kind) for finding in found} == {("warning", "all_zero")} and len(found) == 5

    def test_subnormal_and_negative_zero_numbers_are_fine(self, tmp_path):
        file = tiny()
        info = file.tensors["blk.1.ffn_gate.weight"]
        info.data = b"\1\0\0\x80" + info.data[4:]
        (tmp_path / "model.gguf").write_bytes(file.bytes())
        assert not list(check(tmp_path / "model.gguf"))

    def test_progress_ends_where_it_said_it_would(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(tiny().bytes())
        seen = []
        assert not list(check(tmp_path / "model.gguf", lambda done, total: seen.append((done, total))))
        total = sum(tensor.nbytes for tensor in open_gguf(tmp_path / "model.gguf").tensors.values())
        assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)

"""Malformed model files, each made from a sound one by one lie, with the kinds of error that name it.

    python tests/hostile.py FOLDER      writes them all

A case is a name, the bytes of a file, and what finds it: `load` (reader, config, vocabulary, weights), `check`, which
reads the weights too, or `tokenizer`.
"""

import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny import (
    ARR,
    BOOL,
    F32,
    F64,
    HEAD_GLOBAL,
    HIDDEN,
    I8,
    I32,
    LAYERS,
    STR,
    TOKENS,
    U8,
    U16,
    U32,
    U64,
    WIDTH,
    File,
    array,
    changed,
    scalar,
    string,
    tiny,
)

BIG = 2**64 - 1
GEMMA, GENERAL, VOCAB = "gemma4.", "general.", "tokenizer.ggml."


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], bytes]
    kinds: frozenset[str]  # any of them is right; none: the file is sound
    found_by: str = "load"


def case(name: str, kinds: str, make: Callable[[], bytes | File], found_by: str = "load") -> Case:
    def made() -> bytes:
        file = make()
        return file.bytes() if isinstance(file, File) else file

    return Case(name, made, frozenset(kinds.split()), found_by)


def edit(name: str, kinds: str, *changes: Callable[[File], None], moe: bool = False, found_by: str = "load") -> Case:
    """A case made by changes to the tiny model."""
    return case(name, kinds, lambda: changed(*changes, moe=moe), found_by)


# -- Changes ----------------------------------------------------------------------------------------------


def put(key: str, type: int, value) -> Callable[[File], None]:
    return lambda file: file.set(key, type, value)


def put_array(key: str, type: int, values) -> Callable[[File], None]:
    return lambda file: file.set_array(key, type, values)


def raw(key: str, type: int, payload: bytes) -> Callable[[File], None]:
    """A value whose bytes need not fit its type."""
    return lambda file: file.keys.update({key.encode(): (type, payload)})


def drop(key: str) -> Callable[[File], None]:
    return lambda file: file.keys.pop(key.encode())


def also(*entries: bytes) -> Callable[[File], None]:
    """Key entries appended as they are."""
    return lambda file: file.more_keys.extend(entries)


def with_(**fields) -> Callable[[File], None]:
    """Fields of the header."""
    return lambda file: file.__dict__.update(fields)


def tensor(name: str, /, **fields) -> Callable[[File], None]:
    """Fields of a tensor's entry, or its bytes."""
    return lambda file: file.tensors[name].__dict__.update(fields)


def without(name: str) -> Callable[[File], None]:
    return lambda file: file.tensors.pop(name)


def reshape(name: str, ne: list[int], type: int = 0) -> Callable[[File], None]:
    """Another shape with data to match; F32, or a type of one byte a value."""
    return tensor(name, ne=ne, type=type, data=bytes(int(np.prod(ne)) * (1 if type == 24 else 4)))


def patch(name: str, at: int, raw: bytes) -> Callable[[File], None]:
    """Some of a tensor's bytes."""

    def change(file: File) -> None:
        info = file.tensors[name]
        info.data = info.data[:at] + raw + info.data[at + len(raw) :]

    return change


def tokens(change: Callable[[list], list]) -> Callable[[File], None]:
    return put_array(VOCAB + "tokens", STR, change(list(TOKENS)))


# -- Cases: numbers are the rows of the list of bad inputs ----------------------------------------------------


def containers() -> Iterator[Case]:
    whole = tiny().bytes()
    yield case("empty_file", "not_gguf", lambda: b"")
    for n in (1, 3, 4, 7, 8, 15, 23):
        yield case(f"first_{n}_bytes", "truncated not_gguf", lambda n=n: whole[:n])
    yield case("header_empty_model", "missing_key", lambda: File({}, {}))
    yield case("header_empty_with_zeros", "missing_key", lambda: File({}, {}).bytes() + bytes(100))
    for name, start in {
        "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "html": b"<!DOCTYPE html><html>404</html>",
        "gzip": b"\x1f\x8b\x08\x00",
        "safetensors": struct.pack("<Q", 80) + b'{"__metadata__":{}}',
        "zip": b"PK\x03\x04",
        "json": b'{"a": 1}',
        "old_ggml": b"tjgg",
        "zeros": bytes(5000),
        "text": b"GGUX" + whole[4:],
    }.items():
        yield case(f"not_gguf_{name}", "not_gguf", lambda start=start: start)
    for version in (0, 1, 4, 2**32 - 1):
        yield edit(f"version_{version}", "unsupported_version", with_(version=version))
    yield edit("big_endian", "bad_endian", with_(version=3 << 24))
    for count in (BIG, 2**63, 2**31, 2**32 + 10, 65_537, 10**6):
        yield edit(f"tensor_count_{count}", "bad_count", with_(tensor_count=count))
        yield edit(f"key_count_{count}", "bad_count", with_(key_count=count))
    keys, count = len(tiny().keys), len(tiny().tensors)
    garbled = "bad_key bad_type bad_string bad_tensor_name bad_dims bad_quant_type truncated bad_offset overflow"
    yield edit("tensor_count_one_more", garbled, with_(tensor_count=count + 1))
    yield edit("tensor_count_one_less", "missing_tensor numeric bad_offset", with_(tensor_count=count - 1))
    yield edit("key_count_one_more", garbled, with_(key_count=keys + 1))
    yield edit("key_count_one_less", garbled, with_(key_count=keys - 1))
    for percent in (1, 3, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99):
        kinds = "truncated out_of_file bad_string bad_array bad_count"
        yield case(f"cut_at_{percent}_percent", kinds, lambda p=percent: whole[: len(whole) * p // 100])
    yield case("cut_last_byte", "out_of_file", lambda: whole[:-1])
    yield case("cut_before_data", "out_of_file", lambda: tiny().header()[0])


def strings_and_keys() -> Iterator[Case]:
    left = len(tiny().bytes())
    for length in (BIG, 2**63, 1 << 30, 2**32 + 1, left + 1):
        lie = struct.pack("<Q", length)
        yield edit(f"key_length_{length}", "bad_string", also(lie + b"general.name"))
        yield edit(f"value_length_{length}", "bad_string", raw("general.name", STR, lie + b"x"))
        yield edit(f"token_length_{length}", "bad_string", raw("a.b", ARR, struct.pack("<IQ", STR, 9) + lie + b"x"))
        yield edit(f"tensor_name_length_{length}", "bad_string", tensor("output_norm.weight", name_bytes=length))
    value = struct.pack("<IB", U8, 1)
    for name, key in {
        "empty": b"", "non_ascii": "gemma4.größe".encode(), "nul": b"general\0name", "70_kb": b"k" * 70_000,
        "space": b"general name", "control": b"general\nname",
    }.items():  # fmt: skip
        yield edit(f"key_{name}", "bad_key", also(string(key) + value))
    one, two = (string("general.x") + struct.pack("<IB", U8, n) for n in (1, 2))
    yield edit("key_twice_same", "duplicate_key", also(one, one))
    yield edit("key_twice_other", "duplicate_key", also(one, two))
    align = string("general.alignment") + struct.pack("<II", U32, 32)
    yield edit("alignment_twice", "duplicate_key", also(align, align))
    yield edit("value_not_utf8", "bad_string", put("general.name", STR, b"\xff\xfe"))
    for number in (13, 255, 2**31 - 1, 2**32 - 1):
        yield edit(f"value_type_{number}", "bad_type", raw("general.name", number, bytes(8)))
        yield edit(
            f"element_type_{number}", "bad_type", raw("general.x", ARR, struct.pack("<IQ", number, 1) + bytes(8))
        )
    for count in (BIG, 2**61 + 1, 1 << 40, 1 << 30):
        for element in (U8, U32, F64, STR):
            claim = struct.pack("<IQ", element, count)
            yield edit(f"array_{count}_of_{element}", "bad_array", raw("general.x", ARR, claim + bytes(16)))
    nested = struct.pack("<IQ", ARR, 1) * 40_000 + struct.pack("<IQ", U8, 0)
    yield edit("nested_arrays", "bad_array", raw("general.x", ARR, nested))
    yield edit("empty_arrays_2_60", "bad_array", raw("general.x", ARR, struct.pack("<IQ", ARR, 1 << 60)))
    yield edit("bool_7", "bad_type", raw(VOCAB + "add_bos_token", BOOL, b"\7"))
    yield edit("bool_array_2", "bad_type", raw("general.x", ARR, struct.pack("<IQ", BOOL, 2) + b"\1\2"))
    for alignment in (0, 3, 4, 7, 24, 1 << 31, 2**32 - 1):
        yield edit(f"alignment_{alignment}", "bad_alignment", put(GENERAL + "alignment", U32, alignment))
    for type, value in ((STR, "32"), (U64, 32), (F32, 32.0), (I32, 32)):
        yield edit(f"alignment_as_{type}", "bad_type", put(GENERAL + "alignment", type, value))


def tensor_entries() -> Iterator[Case]:
    q, norm = "blk.0.attn_q.weight", "output_norm.weight"
    for name, raw_name in {
        "64_bytes": b"x" * 64, "empty": b"", "nul": b"output\0norm", "path": b"../../etc/passwd",
        "non_ascii": b"\xc3\xa4", "5_mb": b"y" * 5_000_000,
    }.items():  # fmt: skip
        yield edit(f"tensor_name_{name}", "bad_tensor_name", tensor(norm, name=raw_name))
    yield edit("tensor_twice", "duplicate_tensor", tensor(q, name=b"output_norm.weight"))
    for dims in (0, 5, 2**32 - 1):
        yield edit(f"dims_{dims}", "bad_dims", tensor(norm, dims=dims))
    for ne in (0, BIG, 1 << 63, 1 << 41):
        yield edit(f"ne_{ne}", "bad_dims", tensor(norm, ne=[ne]))
    for ne in ([1 << 32, 1 << 32], [64, (1 << 40) - 32, 1 << 20], [1 << 40] * 4, [1 << 40, 1 << 21, 1]):
        yield edit(f"product_{'x'.join(map(str, ne))}", "overflow", tensor(norm, ne=ne))
    yield edit("size_at_2_62", "out_of_file", tensor(norm, ne=[1 << 40, 1 << 20]))
    for number in (4, 5, 31, 36, 43, 99, 1 << 31, 2**32 - 1):
        yield edit(f"tensor_type_{number}", "bad_quant_type", tensor(q, type=number))
    yield edit("row_not_whole_blocks", "bad_block_size", tensor(q, ne=[33, 32]))
    yield edit("row_not_whole_superblocks", "bad_block_size", tensor(q, type=12))
    for offset in (1 << 20, 1 << 40, (1 << 62) + 32):
        yield edit(f"offset_{offset}", "bad_offset out_of_file", tensor(norm, offset=offset))
    for offset in (1 << 63, BIG - 31):
        yield edit(f"offset_{offset}", "overflow", tensor(norm, offset=offset))
    last = list(tiny().tensors)[-1]
    rows = tiny().tensors[last].ne
    yield edit("last_tensor_one_row_too_big", "out_of_file", tensor(last, ne=[*rows[:-1], rows[-1] + 8]))
    yield edit("offset_unaligned", "bad_offset", tensor(norm, offset=33))
    yield edit("offset_overlapping", "bad_offset", tensor(norm, offset=0))
    _, offsets = tiny().header()
    yield edit("offset_with_hole", "bad_offset", tensor(last, offset=offsets[-1] + 4096))
    yield edit("split_count_alone", "bad_split", put("split.count", U16, 2))
    yield edit("split_count_65535", "bad_split", put("split.count", U16, 65535))
    yield edit("split_no_past_count", "bad_split", put("split.no", U16, 9), put("split.count", U16, 2))
    yield edit("split_count_as_text", "bad_type", put("split.count", STR, "2"))


# Key, kinds of error, U32 values that must end in one of them.
OUT_OF_RANGE = (
    ("block_count", "bad_hparam", (0, 513, 2**32 - 1)),
    ("block_count", "bad_array", (LAYERS - 1, LAYERS + 1, 200)),
    ("embedding_length", "bad_hparam", (0, 33, 2**32 - 1)),
    ("embedding_length", "shape_mismatch", (2 * WIDTH, WIDTH // 2)),
    ("feed_forward_length", "bad_hparam", (0, 100, 2**32 - 1)),
    ("feed_forward_length", "shape_mismatch", (HIDDEN * 2,)),
    ("attention.head_count", "bad_hparam", (0, 2**32 - 1, 3)),
    ("attention.head_count", "shape_mismatch", (4,)),
    ("attention.head_count_kv", "bad_hparam", (0, 3, 4, 2**32 - 1)),
    ("attention.head_count_kv", "shape_mismatch", (2,)),
    ("attention.key_length", "bad_hparam", (0, 31, 64, 2**32 - 1)),
    ("attention.value_length", "bad_hparam", (0, 16, 2**32 - 1)),
    ("attention.key_length_swa", "bad_hparam", (0, 15, 32, 2**32 - 1)),
    ("attention.value_length_swa", "bad_hparam", (32,)),
    ("attention.sliding_window", "bad_hparam", (0, 2**32 - 1)),
    ("attention.shared_kv_layers", "bad_hparam", (LAYERS, 3, 100, 2**32 - 1)),
    ("attention.shared_kv_layers", "missing_tensor", (0,)),
    ("rope.dimension_count", "bad_hparam", (0, 4096, 31, 16)),
    ("rope.dimension_count_swa", "bad_hparam", (0, 15, 32)),
    ("context_length", "bad_hparam", (0, 2**32 - 1)),
    ("expert_count", "bad_hparam", (4, 2**32 - 1)),
    ("embedding_length_per_layer_input", "bad_hparam", (7, 2**32 - 1)),
    ("embedding_length_per_layer_input", "shape_mismatch", (64,)),
)


def hyperparameters() -> Iterator[Case]:
    architecture = GENERAL + "architecture"
    yield edit("architecture_missing", "missing_key", drop(architecture))
    for name, value in {
        "other": "llama", "empty": "", "huge": "x" * 500_000, "terminal": "\x1b[31mgemma4\n\r", "encoder": "clip",
    }.items():  # fmt: skip
        yield edit(f"architecture_{name}", "bad_arch", put(architecture, STR, value))
    yield edit("architecture_as_number", "bad_type", put(architecture, U32, 4))
    for key, kinds, values in OUT_OF_RANGE:
        for value in values:
            yield edit(f"{key}_{value}", kinds, put(GEMMA + key, U32, value))
    for key, values in {
        "attention.layer_norm_rms_epsilon": (0.0, -1.0, np.nan, np.inf, 1.0),
        "rope.freq_base": (0.0, -1.0, np.nan, np.inf),
        "rope.freq_base_swa": (0.0, np.nan),
        "final_logit_softcapping": (-30.0, np.nan, np.inf),
    }.items():
        for value in values:
            yield edit(f"{key}_{value}", "bad_hparam", put(GEMMA + key, F32, value))


def hyperparameter_types() -> Iterator[Case]:
    for key, type, value in (
        ("block_count", STR, "4"), ("block_count", F32, 4.0), ("embedding_length", F32, 64.0),
        ("embedding_length", BOOL, True), ("rope.freq_base", U32, 10_000), ("rope.freq_base", F64, 1e6),
        ("attention.sliding_window_pattern", U32, 2), ("final_logit_softcapping", STR, "30"),
    ):  # fmt: skip
        yield edit(f"{key}_as_{type}", "bad_type", put(GEMMA + key, type, value))
    yield edit("block_count_minus_1", "bad_hparam", put(GEMMA + "block_count", I32, -1))
    pattern = GEMMA + "attention.sliding_window_pattern"
    yield edit("pattern_short", "bad_array", put_array(pattern, BOOL, [True, False, True]))
    yield edit("pattern_5000", "bad_array", put_array(pattern, BOOL, [True] * 5000))
    yield edit("pattern_empty", "bad_array", put_array(pattern, BOOL, []))
    yield edit("pattern_strings", "bad_type", put_array(pattern, STR, ["a"] * LAYERS))
    yield edit("pattern_u64", "bad_type", put_array(pattern, U64, [1] * LAYERS))
    yield edit("pattern_all_global", "shape_mismatch", put_array(pattern, BOOL, [False] * LAYERS))
    yield edit("pattern_all_sliding", "shape_mismatch", put_array(pattern, BOOL, [True] * LAYERS))
    yield edit("heads_array_short", "bad_array", put_array(GEMMA + "attention.head_count", I32, [2]))
    yield edit("hidden_array_zero", "bad_hparam", put_array(GEMMA + "feed_forward_length", I32, [0] * LAYERS))
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
                "attention.head_count_kv", "attention.key_length", "attention.sliding_window", "rope.freq_base",
                "attention.sliding_window_pattern", "attention.layer_norm_rms_epsilon"):  # fmt: skip
        yield edit(f"{key}_missing", "missing_key", drop(GEMMA + key))
    for key, kinds, values in (
        ("expert_count", "bad_hparam", (0, 1)),
        ("expert_count", "shape_mismatch", (8,)),
        ("expert_used_count", "bad_hparam", (0, 5, 2**32 - 1)),
        ("expert_feed_forward_length", "bad_hparam", (0, 33)),
        ("expert_feed_forward_length", "shape_mismatch", (64,)),
    ):
        for value in values:
            yield edit(f"moe_{key}_{value}", kinds, put(GEMMA + key, U32, value), moe=True)


def weights() -> Iterator[Case]:
    # Only one global layer of the dense model has values: without them it is a sound model whose values are its keys.
    fine = {"blk.0.layer_output_scale.weight", "blk.1.layer_output_scale.weight", "blk.1.attn_v.weight"}
    for moe in (False, True):
        for name in sorted(tiny(moe).tensors.keys() - fine - (tiny().tensors.keys() if moe else set())):
            if not name.startswith(("blk.2", "blk.3")):
                yield edit(f"without_{name}", "missing_tensor", without(name), moe=moe)
    q, norm = "blk.0.attn_q.weight", "blk.1.attn_norm.weight"
    yield edit("norm_of_rank_2", "shape_mismatch", tensor(norm, ne=[WIDTH, 1]))
    yield edit("matrix_of_rank_1", "shape_mismatch", tensor(q, ne=[WIDTH * 32]))
    yield edit("matrix_transposed", "shape_mismatch", tensor("blk.0.ffn_up.weight", ne=[HIDDEN, WIDTH]))
    yield edit("norm_too_long", "shape_mismatch", reshape(norm, [WIDTH * 2]))
    yield edit("scale_too_long", "shape_mismatch", reshape("blk.0.layer_output_scale.weight", [2]))
    yield edit("norm_as_q8_0", "bad_tensor_type", tensor(norm, type=8, data=bytes(68)))
    yield edit("norm_as_i32", "bad_tensor_type", tensor(norm, type=26))
    yield edit("norm_as_f64", "bad_tensor_type", tensor(norm, type=28, data=bytes(8 * WIDTH)))
    yield edit("norm_as_i8", "bad_tensor_type", reshape(norm, [WIDTH], type=24))
    for number, block, size in ((16, 256, 66), (19, 256, 50), (34, 256, 54), (40, 64, 36), (24, 1, 1), (26, 1, 4)):
        count = WIDTH * HIDDEN // block * size
        change = tensor("blk.0.ffn_down.weight", type=number, data=bytes(count))
        yield edit(f"matrix_of_type_{number}", "bad_tensor_type", change)
    yield edit("embedding_rows_fewer", "shape_mismatch", reshape("token_embd.weight", [WIDTH, len(TOKENS) - 1]))
    yield edit("embedding_rows_more", "shape_mismatch", reshape("token_embd.weight", [WIDTH, len(TOKENS) + 1]))
    yield edit("embedding_of_rank_1", "shape_mismatch", reshape("token_embd.weight", [len(TOKENS)]))
    yield edit("rope_freqs_short", "shape_mismatch", reshape("rope_freqs.weight", [HEAD_GLOBAL // 4]))
    for name, value in (("nan", np.nan), ("zero", 0.0), ("negative", -1.0)):
        yield edit(f"rope_freqs_{name}", "numeric", patch("rope_freqs.weight", 4, struct.pack("<f", value)))
    nothing = np.full(HEAD_GLOBAL // 2, 1e30, "<f4").tobytes()
    yield edit("rope_freqs_none_turn", "bad_hparam", tensor("rope_freqs.weight", data=nothing))
    yield edit("values_lost_in_one_layer", "missing_tensor", without("blk.0.attn_v.weight"))
    scale = tensor("blk.0.layer_output_scale.weight", name=b"blk.0.ffn_up.scale", ne=[2], data=bytes(8))
    yield edit("scale_of_two", "bad_tensor_type", scale)


def vocabularies() -> Iterator[Case]:
    key, bad = VOCAB + "tokens", "bad_tokenizer"
    yield edit("model_other", bad, put(VOCAB + "model", STR, "gpt2"))
    yield edit("model_missing", "missing_key", drop(VOCAB + "model"))
    yield edit("tokens_missing", "missing_key", drop(key))
    yield edit("tokens_none", "bad_tokenizer bad_array", put_array(key, STR, []))
    yield edit("tokens_ints", "bad_type", put_array(key, I32, range(len(TOKENS))))
    yield edit("tokens_scalar", "bad_type", put(key, STR, "a"))
    yield edit("tokens_too_few", "bad_array", tokens(lambda t: t[:-1]))
    yield edit("token_empty", bad, tokens(lambda t: [*t[:-1], ""]))
    yield edit("token_not_utf8", bad, tokens(lambda t: [*t[:-1], b"\xff\xfe"]))
    yield edit("token_cut_character", bad, tokens(lambda t: [*t[:-2], b"\xe2\x96", b"\x81"]))
    yield edit("token_twice", bad, tokens(lambda t: [*t[:-1], "hi"]), found_by="check")
    yield edit("token_500_kb", bad, tokens(lambda t: [*t[:-1], "x" * 500_000]), found_by="tokenizer")
    for name, spelling in (("negative", "<0x-1>"), ("not_hex", "<0xZZ>"), ("short", "<0x1>"), ("lower", "<0xff>")):
        yield edit(f"byte_token_{name}", bad, tokens(lambda t, s=spelling: [s if x == "<0xFF>" else x for x in t]))
    count = len(TOKENS)
    for name, type, element in (("scores", F32, -1.0), ("token_type", I32, 1)):
        yield edit(f"{name}_u8", "bad_type", put_array(VOCAB + name, U8, [1] * count))
        yield edit(f"{name}_short", "bad_array", put_array(VOCAB + name, type, [element] * (count - 1)))
        yield edit(f"{name}_scalar", "bad_type", put(VOCAB + name, type, element))
    yield edit("token_type_strings", "bad_type", put_array(VOCAB + "token_type", STR, ["a"] * count))
    for role in ("bos", "eos", "unknown", "padding"):
        for value in (count, 2**31 - 1):
            yield edit(f"{role}_{value}", bad, put(f"{VOCAB}{role}_token_id", U32, value))
        yield edit(f"{role}_max", "bad_hparam bad_tokenizer", put(f"{VOCAB}{role}_token_id", U32, 2**32 - 1))
        yield edit(f"{role}_text", "bad_type", put(f"{VOCAB}{role}_token_id", STR, "2"))
    unnamed = tokens(lambda t: [x.replace("<bos>", "<beginning>") for x in t])
    yield edit("bos_unknown", bad, unnamed, drop(VOCAB + "bos_token_id"))
    yield edit("suppress_past_end", bad, put_array(VOCAB + "suppress_tokens", I32, [count]))
    yield edit("suppress_i8", "bad_type", put_array(VOCAB + "suppress_tokens", I8, [1]))
    yield edit("merges_missing", "missing_key", drop(VOCAB + "merges"))
    yield edit("merges_ints", "bad_type", put_array(VOCAB + "merges", I32, [1, 2]))


def numbers() -> Iterator[Case]:
    nan, inf = struct.pack("<f", np.nan), struct.pack("<f", np.inf)
    half_nan, half_inf = struct.pack("<e", np.nan), struct.pack("<e", -np.inf)
    for name, tensor_name, at, value in (
        ("norm_nan", "blk.0.attn_norm.weight", 8, nan),
        ("norm_inf", "output_norm.weight", 252, inf),
        ("scale_inf", "blk.3.layer_output_scale.weight", 0, inf),
        ("f32_nan", "blk.2.proj.weight", 4096, nan),
        ("f16_nan", "blk.1.ffn_gate.weight", 100, half_nan),
        ("f16_inf", "blk.1.ffn_gate.weight", 0, half_inf),
        ("bf16_inf", "per_layer_model_proj.weight", 4, struct.pack("<H", 0x7F80)),
        ("q8_0_nan", "token_embd.weight", 34 * 5, half_nan),
        ("q4_0_inf", "blk.0.ffn_up.weight", 18 * 100, half_inf),
        ("q4_k_d_nan", "blk.0.ffn_down.weight", 144, half_nan),
        ("q4_k_dmin_inf", "blk.0.ffn_down.weight", 146, half_inf),
        ("q6_k_inf", "blk.1.ffn_down.weight", 210 * 63 + 208, half_inf),
    ):
        yield edit(f"number_{name}", "numeric", patch(tensor_name, at, value), found_by="check")


def sound() -> Iterator[Case]:
    """Odd, but right: these load, and quickly."""
    yield edit("sound", "")
    yield edit("sound_moe", "", moe=True)
    many = [string(f"x.{i}") + struct.pack("<II", U32, i) for i in range(20_000)]
    yield edit("sound_20000_keys", "", also(*many))
    yield case("sound_5000_tensors", "", lambda: changed(_more_tensors))
    yield edit("sound_version_2", "", with_(version=2))
    yield edit("sound_alignment_64", "", put(GENERAL + "alignment", U32, 64), with_(alignment=64))
    yield edit("sound_name_with_escapes", "", put(GENERAL + "name", STR, "\x1b[31mred\n"))
    yield edit("sound_many_merges", "", put_array(VOCAB + "merges", STR, ["h i"] * 40_000))
    yield edit("sound_unknown_array", "", raw("x.y", ARR, array(U16, [1, 2, 3])))
    yield edit("sound_pieces", "", raw("x.z", STR, scalar(STR, "")))


def _more_tensors(file: File) -> None:
    norm = file.tensors["output_norm.weight"]
    for i in range(5000):
        file.tensors[f"extra.{i}"] = type(norm)(f"extra.{i}".encode(), [8], 0, bytes(32))


GROUPS = (
    containers, strings_and_keys, tensor_entries, hyperparameters, hyperparameter_types, weights, vocabularies, numbers,
    sound,
)  # fmt: skip
CASES = [one for group in GROUPS for one in group()]


def main(folder: str) -> None:
    for one in CASES:
        (Path(folder) / f"{one.name}.gguf").write_bytes(one.make())
    print(f"{len(CASES)} files")


if __name__ == "__main__":
    main(sys.argv[1])

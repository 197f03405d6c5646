"""GGUF files built field by field, without the package's own writer: two tiny sound models, to be damaged at will.

A `File` is a list of keys and a list of tensors that a test may change in any way before it is written, rules or not.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

# ggml's types as they are used here: number, values and bytes of a block, where its half floats lie.
TYPES = {
    "F32": (0, 1, 4, ()),
    "F16": (1, 1, 2, (0,)),
    "BF16": (30, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}
LAYERS, WIDTH, HIDDEN, PER_LAYER, EXPERTS, EXPERT_HIDDEN, WINDOW = 4, 64, 256, 32, 4, 32, 8
HEADS, HEAD_LOCAL, HEAD_GLOBAL = 2, 16, 32
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "\n", "▁"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "▁h", "hi", "▁hi"]
TOKENS = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
MERGES = ["h i", "▁ h", "▁h i", "▁ hi"]


def scalar(type: int, value) -> bytes:
    return string(value) if type == STR else struct.pack("<" + PACK[type], value)


def string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def array(type: int, values) -> bytes:
    return struct.pack("<IQ", type, len(values)) + b"".join(scalar(type, value) for value in values)


@dataclass
class Info:
    """A tensor: its entry in the header, any field of which may be a lie, and its bytes."""

    name: bytes
    ne: list[int]  # fastest first, as in the file
    type: int
    data: bytes
    dims: int | None = None
    offset: int | None = None
    name_bytes: int | None = None


@dataclass
class File:
    """Keys as {key: (type, payload)} and tensors by name; the rest says how the header lies about them."""

    keys: dict[bytes, tuple[int, bytes]]
    tensors: dict[str, Info]
    magic: bytes = b"GGUF"
    version: int = 3
    key_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    more_keys: list[bytes] = field(default_factory=list)  # appended as they are

    def set(self, key: str, type: int, value) -> None:
        self.keys[key.encode()] = (type, scalar(type, value))

    def set_array(self, key: str, type: int, values) -> None:
        self.keys[key.encode()] = (ARR, array(type, values))

    def header(self) -> tuple[bytes, list[int]]:
        """Everything before the data, unpadded, and where each tensor begins in the data."""
        keys = len(self.keys) + len(self.more_keys) if self.key_count is None else self.key_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        out = [self.magic, struct.pack("<IQQ", self.version, tensors, keys)]
        out += [string(key) + struct.pack("<I", type) + payload for key, (type, payload) in self.keys.items()]
        out += self.more_keys
        offsets, offset = [], 0
        for info in self.tensors.values():
            offsets.append(offset)
            length = len(info.name) if info.name_bytes is None else info.name_bytes
            dims = len(info.ne) if info.dims is None else info.dims
            at = offset if info.offset is None else info.offset
            out.append(struct.pack("<Q", length) + info.name + struct.pack("<I", dims))
            out.append(struct.pack(f"<{len(info.ne)}QIQ", *info.ne, info.type, at))
            offset += -(-len(info.data) // self.alignment) * self.alignment
        return b"".join(out), offsets

    def bytes(self) -> bytes:
        header, offsets = self.header()
        out = bytearray(header + bytes(-len(header) % self.alignment))
        start = len(out)
        for info, offset in zip(self.tensors.values(), offsets, strict=True):
            out += bytes(start + offset - len(out)) + info.data
        return bytes(out)


def values(shape: list[int], type: str, random: np.random.Generator) -> bytes:
    """Sound random weights; blocks have random quants under small scales."""
    _, per_block, block_bytes, halves = TYPES[type]
    count = int(np.prod(shape)) // per_block
    if type in ("F32", "BF16"):
        floats = random.normal(0, 0.05, count).astype("<f4")
        return floats.tobytes() if type == "F32" else (floats.view("<u4") >> 16).astype("<u2").tobytes()
    if type == "F16":
        return random.normal(0, 0.05, count).astype("<f2").tobytes()
    blocks = random.integers(0, 256, (count, block_bytes), np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    return blocks.tobytes()


def vocabulary(file: File) -> None:
    key = "tokenizer.ggml."
    file.set(key + "model", STR, "gemma4")
    file.set_array(key + "tokens", STR, TOKENS)
    file.set_array(key + "scores", F32, [-1000.0] * len(TOKENS))
    kinds = [3] * 9 + [1] * (len(SPECIAL) - 9) + [6] * 256 + [1] * len(WORDS)
    file.set_array(key + "token_type", I32, kinds)
    file.set_array(key + "merges", STR, MERGES)
    for name, token in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0), ("mask", 4)):
        file.set(f"{key}{name}_token_id", U32, token)
    file.set(key + "add_bos_token", BOOL, True)


def geometry(file: File, moe: bool) -> None:
    file.set("general.architecture", STR, "gemma4")
    for key, value in {
        "block_count": LAYERS,
        "context_length": 256,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.key_length": HEAD_GLOBAL,
        "attention.value_length": HEAD_GLOBAL,
        "attention.key_length_swa": HEAD_LOCAL,
        "attention.value_length_swa": HEAD_LOCAL,
        "attention.sliding_window": WINDOW,
        "attention.shared_kv_layers": 0 if moe else 2,
        "rope.dimension_count": HEAD_GLOBAL,
        "rope.dimension_count_swa": HEAD_LOCAL,
        "embedding_length_per_layer_input": 0 if moe else PER_LAYER,
        "expert_count": EXPERTS if moe else 0,
        "expert_used_count": 2 if moe else 0,
        "expert_feed_forward_length": EXPERT_HIDDEN if moe else 0,
    }.items():
        file.set("gemma4." + key, U32, value)
    for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }.items():
        file.set("gemma4." + key, F32, value)
    file.set_array("gemma4.attention.sliding_window_pattern", BOOL, [True, False] * (LAYERS // 2))


def shapes(moe: bool) -> dict[str, tuple[list[int], str]]:
    """Name to ([rows, cols], type) of every tensor; one dimension for vectors."""
    vocab = len(TOKENS)
    out = {
        "token_embd.weight": ([vocab, WIDTH], "Q8_0"),
        "output_norm.weight": ([WIDTH], "F32"),
        "rope_freqs.weight": ([HEAD_GLOBAL // 2], "F32"),
    }
    if not moe:
        out["per_layer_token_embd.weight"] = ([vocab, LAYERS * PER_LAYER], "Q8_0")
        out["per_layer_model_proj.weight"] = ([LAYERS * PER_LAYER, WIDTH], "BF16")
        out["per_layer_proj_norm.weight"] = ([PER_LAYER], "F32")
    for i in range(LAYERS):
        head, owns = (HEAD_GLOBAL if i % 2 else HEAD_LOCAL), moe or i < 2
        layer = {
            "attn_norm.weight": ([WIDTH], "F32"),
            "attn_q.weight": ([HEADS * head, WIDTH], "Q8_0"),
            "attn_q_norm.weight": ([head], "F32"),
            "attn_output.weight": ([WIDTH, HEADS * head], "Q4_0"),
            "post_attention_norm.weight": ([WIDTH], "F32"),
            "ffn_norm.weight": ([WIDTH], "F32"),
            "ffn_gate.weight": ([HIDDEN, WIDTH], "F16"),
            "ffn_up.weight": ([HIDDEN, WIDTH], "Q4_0"),
            "ffn_down.weight": ([WIDTH, HIDDEN], "Q6_K" if i % 2 else "Q4_K"),
            "post_ffw_norm.weight": ([WIDTH], "F32"),
            "layer_output_scale.weight": ([1], "F32"),
        }
        if owns:
            layer["attn_k.weight"] = ([head, WIDTH], "Q8_0")
            layer["attn_k_norm.weight"] = ([head], "F32")
            if not (moe and i % 2):
                layer["attn_v.weight"] = ([head, WIDTH], "Q8_0")
        if moe:
            layer |= {
                "ffn_gate_inp.weight": ([EXPERTS, WIDTH], "F32"),
                "ffn_gate_inp.scale": ([WIDTH], "F32"),
                "ffn_gate_up_exps.weight": ([EXPERTS, 2 * EXPERT_HIDDEN, WIDTH], "Q4_0"),
                "ffn_down_exps.weight": ([EXPERTS, WIDTH, EXPERT_HIDDEN], "Q8_0"),
                "ffn_down_exps.scale": ([EXPERTS], "F32"),
                "pre_ffw_norm_2.weight": ([WIDTH], "F32"),
                "post_ffw_norm_1.weight": ([WIDTH], "F32"),
                "post_ffw_norm_2.weight": ([WIDTH], "F32"),
            }
        else:
            layer["inp_gate.weight"] = ([PER_LAYER, WIDTH], "F32")
            layer["proj.weight"] = ([WIDTH, PER_LAYER], "F32")
            layer["post_norm.weight"] = ([WIDTH], "F32")
        out |= {f"blk.{i}.{name}": entry for name, entry in layer.items()}
    return out


def tiny(moe: bool = False) -> File:
    """A sound model of four layers, sliding and global in turn: with per-layer inputs and borrowed keys, or routed."""
    file = File({}, {})
    geometry(file, moe)
    vocabulary(file)
    random = np.random.default_rng(4)
    for name, (shape, type) in shapes(moe).items():
        data = values(shape, type, random)
        if len(shape) == 1:
            data = (1 + np.frombuffer(data, "<f4")).astype("<f4").tobytes()
        file.tensors[name] = Info(name.encode(), shape[::-1], TYPES[type][0], data)
    factors = np.where(np.arange(HEAD_GLOBAL // 2) < 4, 1, 1e30).astype("<f4")
    file.tensors["rope_freqs.weight"].data = factors.tobytes()
    return file


def changed(*changes: Callable[[File], None], moe: bool = False) -> File:
    """A tiny model after some changes."""
    file = tiny(moe)
    for change in changes:
        change(file)
    return file

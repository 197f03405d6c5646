"""A text model or an assistant as GGUF tensors: all there, of the right shapes, and nothing beside them.

What a model needs is the word of `model.config` and `model.weights`, which are asked about the file to be written
before a byte of it is; faults are told in the checkpoint's names.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor

import numpy as np

from ..abi import TensorType
from ..errors import Gemma4qError
from ..gguf.reader import GGUF, Tensor
from ..gguf.writer import TensorData, Types, natural_type
from ..model import config as geometry
from ..model import weights
from ..model.config import Config
from ..model.hparams import ROPE_FREQS
from ..model.vocabulary import vocabulary_faults
from .config import Source, rope_frequencies
from .names import ASSISTANT, CENTROIDS, ORDERING, TEXT, is_encoder, source_name, target_name
from .pack import ordering, packed, stored_type
from .safetensors import Checkpoint, Stored

EMBEDDING = "token_embd.weight"
# Written by the converter of transformers' first models, and computed by everyone else.
_DERIVED = (".rotary_emb.inv_freq",)


def chosen(source: Source, checkpoint: Checkpoint) -> dict[str, Stored]:
    """The checkpoint's tensors by GGUF name, in the order to write. Raises extra_tensor or duplicate_tensor."""
    table, found = ASSISTANT if source.is_assistant else TEXT, {}
    for name, stored in checkpoint.items():
        if is_encoder(name) or name.endswith(_DERIVED):
            continue
        target = target_name(name, table)
        if target is None:
            raise Gemma4qError("extra_tensor", f"{name} ({stored.path.name}) belongs to no Gemma 4 model")
        if target in found:
            raise Gemma4qError("duplicate_tensor", f"{name} and {found[target].name} are the same tensor")
        found[target] = stored
    return dict(sorted(found.items(), key=_place))


def _place(item: tuple[str, Stored]) -> tuple[int, int, str]:
    """Tables first, then layer by layer, as a model is computed."""
    name = item[0]
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (2 if name.startswith("output") else 0), 0, name


def text_tensors(
    source: Source,
    found: Mapping[str, Stored],
    metadata: Mapping[str, object],
    types: Mapping[str, Types],
    outtype: TensorType,
    pool: Executor,
) -> list[TensorData]:
    """The tensors to write. Raises the first fault: missing_tensor, shape_mismatch, extra_tensor, bad_hparam, ..."""
    for stored in found.values():
        if not all(stored.shape) or not 1 <= len(stored.shape) <= 4:
            fault = f"{stored.name} has shape {list(stored.shape)}: no tensor of a model is empty or a mere number"
            raise Gemma4qError("shape_mismatch", fault)
    vocab = len(metadata["tokenizer.ggml.tokens"])
    shapes = {name: stored.shape for name, stored in found.items()}
    if shapes.get(EMBEDDING, (0,))[0] > vocab:  # rows that no token has are left out
        shapes[EMBEDDING] = (vocab, *shapes[EMBEDDING][1:])
    kinds = {name: stored_type(name, shape, outtype) for name, shape in shapes.items()}
    frequencies = rope_frequencies(source)
    _raise(source, _faults(source, shapes, kinds, frequencies, metadata, types))
    out = [TensorData.of(ROPE_FREQS, TensorType.F32, frequencies.shape, frequencies)]
    for name, stored in found.items():
        if name == ORDERING:
            out.append(ordering(name, stored, vocab))
        else:
            out.append(packed(name, stored, shapes[name], kinds[name], pool))
    return out


def _faults(source, shapes, kinds, frequencies, metadata, types) -> Iterator[Gemma4qError]:
    """What is wrong with the file to be written, in GGUF's names."""
    empty = np.zeros(0, np.uint8)
    tensors = {name: Tensor(name, kinds[name], shape, 0, 0, empty) for name, shape in shapes.items()}
    data = frequencies.view(np.uint8)
    tensors[ROPE_FREQS] = Tensor(ROPE_FREQS, TensorType.F32, frequencies.shape, 0, 0, data)
    gguf = GGUF((), dict(metadata), {key: types.get(key) or natural_type(v) for key, v in metadata.items()}, tensors)
    config, faults = geometry.examine(gguf)
    yield from faults
    if config is None:
        return
    bound, faults = weights.examine(gguf, config)
    yield from faults
    yield from _expected(source, shapes, config)
    for name in bound.ignored:
        if name not in (CENTROIDS, ORDERING):
            yield Gemma4qError("extra_tensor", f"{name} has no place in a model of this config.json")
    yield from vocabulary_faults(gguf)


def _expected(source: Source, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Iterator[Gemma4qError]:
    """What a checkpoint always has though an engine could do without, and the shapes of what no engine reads."""
    for layer in config.layers:
        names = ["layer_output_scale"]
        if layer.owns_kv and (layer.window or not source.text["attention_k_eq_v"]):
            names.append("attn_v")
        for name in (layer.weight(n) for n in names):
            if name not in shapes:
                yield Gemma4qError("missing_tensor", f"{name} is not in the file")
        if not layer.owns_kv:
            kv = (layer.kv_heads * layer.head_dim, config.width)
            for name, shape in {"attn_k": kv, "attn_v": kv, "attn_k_norm": (layer.head_dim,)}.items():
                if shapes.get(layer.weight(name), shape) != shape:
                    found = list(shapes[layer.weight(name)])
                    yield Gemma4qError("shape_mismatch", f"{layer.weight(name)} has shape {found}; want {list(shape)}")


def check_clusters(source: Source, found: Mapping[str, Stored]) -> None:
    """Raises missing_tensor or shape_mismatch where an assistant's clustered head is not what config.json says."""
    if not source.is_assistant or not source.text.get("use_ordered_embeddings"):
        return
    wanted = [source.text.get("num_centroids"), source.text.get("hidden_size")]
    for name in (CENTROIDS, ORDERING):
        if name not in found:
            raise Gemma4qError("missing_tensor", f"{source_name(name, ASSISTANT)} is not in {source.folder}")
    if (shape := list(found[CENTROIDS].shape)) != wanted:
        raise Gemma4qError("shape_mismatch", f"{found[CENTROIDS].name} has shape {shape}; want {wanted}")


def _raise(source: Source, faults: Iterator[Gemma4qError]) -> None:
    """Raises the first fault in the checkpoint's words, and says how many more there are."""
    every = list({fault.message: fault for fault in faults}.values())
    if not every:
        return
    first, table = every[0], ASSISTANT if source.is_assistant else TEXT
    name, _, rest = first.message.partition(" ")
    named = source_name(name, table)
    message = f"{named} {rest}" if named != name else first.message
    message = message.replace("is not in the file", f"is not in {source.folder}")
    more = f"; {len(every) - 1} more faults" if len(every) > 1 else ""
    raise Gemma4qError(first.kind, message + more)

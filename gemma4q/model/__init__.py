"""What Gemma 4 is: its geometry, its tensors, its vocabulary's rules, and the forward pass written once."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..gguf.reader import GGUF
    from .config import Config
    from .weights import Weights


def open_model(path: str | os.PathLike) -> "tuple[GGUF, Config, Weights]":
    """Opens and validates a model file, or all parts of a split one.

    Raises `Gemma4qError`: the reader's kinds for the container, then missing_key, bad_type, bad_array, bad_arch,
    bad_hparam, bad_tokenizer, missing_tensor, shape_mismatch, bad_tensor_type, numeric.
    """
    from ..gguf.reader import open_gguf
    from .config import read_config
    from .vocabulary import vocabulary_faults
    from .weights import bind

    gguf = open_gguf(path)
    config = read_config(gguf)
    for fault in vocabulary_faults(gguf):
        raise fault
    return gguf, config, bind(gguf, config)

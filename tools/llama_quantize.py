"""A model file in llama.cpp's own words: `theirs` has its quantiser make one, beside which ours is looked at.

    python llama_quantize.py JOB.json      for an interpreter that has llama-cpp-python; of gemma4q it needs nothing

JOB.json is {"source", "to", "mixture", "pure", "importance", "types", "threads"}: two GGUF files, a name as Q4_K_M,
whether all tensors get its one type, an npz file of float32 [n, cols] for each tensor (n is 1, or experts) or null, and
ggml_type by tensor for those that are not to get what the mixture says. Seconds that it took go to stdout.
"""

import ctypes
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gemma4q.quantize.importance import Importance


def theirs(
    python: str, source: Path, to: Path, mixture: str, importance: "Importance | None" = None, pure: bool = False,
    types: Mapping[str, int] = {},
) -> Path:  # fmt: skip
    """Has llama.cpp write `source` in a mixture to `to`, which is returned. Arguments and errors as for `timed`."""
    timed(python, source, to, mixture, importance, pure, types)
    return to


def timed(
    python: str, source: Path, to: Path, mixture: str, importance: "Importance | None" = None, pure: bool = False,
    types: Mapping[str, int] = {}, threads: int = 1,
) -> float:  # fmt: skip
    """Seconds that llama.cpp needs to write `source` in a mixture to `to`, its interpreter's start not counted.

    python: an interpreter with llama-cpp-python. types: by tensor, instead of the mixture's; what llama.cpp never
    rounds stays as it is all the same. Raises SystemExit with what it said.
    """
    with TemporaryDirectory() as folder:
        weights = None
        if importance is not None:
            found = {name: importance.of(name) for name in importance.entries}
            weights = str(Path(folder) / "importance.npz")
            np.savez(weights, **{name: values for name, values in found.items() if values is not None})
        job = {"source": str(source), "to": str(to), "mixture": mixture, "pure": pure, "importance": weights}
        job |= {"types": {name: int(type) for name, type in types.items()}, "threads": threads}
        (path := Path(folder) / "job.json").write_text(json.dumps(job))
        done = subprocess.run([python, "-P", __file__, path], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mixture} of {source}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def quantize(job: Mapping) -> float:
    """llama.cpp's side: seconds."""
    import llama_cpp as llama

    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{job['mixture']}"), job["pure"]
    params.nthread = job["threads"]
    kept = []  # what params points to
    if job["importance"]:
        for name, values in np.load(job["importance"]).items():
            values = np.ascontiguousarray(values, np.float32)
            data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            kept.append((llama.llama_model_imatrix_data(name.encode(), data, values.size), values))
        entries = (llama.llama_model_imatrix_data * (len(kept) + 1))(*(entry for entry, _ in kept))
        params.imatrix = entries  # the last one, without a name, ends it
    if job["types"]:
        rules = [(f"^{re.escape(name)}$".encode(), type) for name, type in job["types"].items()]
        patterns = (llama.llama_model_tensor_override * (len(rules) + 1))(*rules)
        params.tt_overrides = patterns
    started = time.monotonic()
    if llama.llama_model_quantize(job["source"].encode(), job["to"].encode(), ctypes.byref(params)):
        raise SystemExit("llama.cpp's quantiser failed")
    return time.monotonic() - started


if __name__ == "__main__":
    print(quantize(json.loads(Path(sys.argv[1]).read_text())))

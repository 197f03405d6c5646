"""llama.cpp's part of tools/mixtures_oracle.py, for an interpreter with llama-cpp-python; it needs no gemma4q.

    python llama_types.py < JOBS.json > TYPES.json

Each job is {"path", "file_type", "importance", "options", "patterns"}: a GGUF file, llama_ftype, whether there is an
importance matrix, fields of llama_model_quantize_params, and [regex, ggml_type] pairs. Nothing is quantised: what
`llama_model_quantize` says of a dry run is read, as {tensor: type} for each job.
"""

import ctypes
import json
import re
import sys

import llama_cpp as llama

LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = *(\w+), size = [^\[]*?MiB(?: -> [^\[]*?MiB \((\w+)\))?\n")
SAID: list[str] = []


@llama.llama_log_callback
def listen(level: int, text: bytes, data: object) -> None:
    SAID.append(text.decode(errors="replace"))


def types(job: dict) -> dict[str, str]:
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = job["file_type"], True, 1
    for name, value in job["options"].items():
        setattr(params, name, value)
    value = ctypes.c_float(1)
    importance = (llama.llama_model_imatrix_data * 2)()
    importance[0].name, importance[0].data, importance[0].size = b"none.weight", ctypes.pointer(value), 1
    if job["importance"]:
        params.imatrix = importance
    patterns = (llama.llama_model_tensor_override * (len(job["patterns"]) + 1))()
    for entry, (regex, kind) in zip(patterns, job["patterns"], strict=False):
        entry.pattern, entry.type = regex.encode(), kind
    if job["patterns"]:
        params.tt_overrides = patterns
    SAID.clear()
    if llama.llama_model_quantize(job["path"].encode(), b"", ctypes.byref(params)):
        raise SystemExit(f"{job}: {''.join(SAID)[-2000:]}")
    return {name: (after or before).upper() for name, before, after in LINE.findall("".join(SAID))}


if __name__ == "__main__":
    llama.llama_log_set(listen, None)
    json.dump([types(job) for job in json.load(sys.stdin)], sys.stdout)

"""What llama.cpp's converter makes of the tiny directories of tiny_hf.py, as digests that tests hold `convert` to.

    python tools/convert_oracle.py LLAMA_CPP tests/data/convert.json

LLAMA_CPP is a source directory of llama.cpp, with convert_hf_to_gguf.py in it; the one inside the sdist of
llama-cpp-python will do. Needs torch and transformers (the `peers` extra), in this interpreter or that of --python.
Digests are the first 16 digits of SHA-256, of each tensor's bytes and of long metadata.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tiny_hf

from gemma4q.gguf.reader import GGUF, open_gguf
from gemma4q.gguf.strings import StringArray
from gemma4q.gguf.types import type_name

OUTTYPES = ("f32", "bf16", "f16", "q8_0", "auto")
JOBS = (*((kind, False) for kind in tiny_hf.KINDS), *((kind, True) for kind in tiny_hf.TINY))
SHORT = 8  # entries of an array that is shown as it is


def digest(data: bytes | np.ndarray) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def described(gguf: GGUF) -> dict[str, dict]:
    """A file in few words: what makes two files the same model."""
    tensors = {t.name: f"{type_name(t.type)} {list(t.shape)} {digest(t.data)}" for t in gguf.tensors.values()}
    metadata = {key: " ".join((*(t.name for t in gguf.types[key]), shown(v))) for key, v in gguf.metadata.items()}
    return {"tensors": dict(sorted(tensors.items())), "metadata": dict(sorted(metadata.items()))}


def shown(value: object) -> str:
    if isinstance(value, StringArray):
        return str([text.decode() for text in value] if len(value) <= SHORT else digest(value.data.tobytes()))
    if isinstance(value, np.ndarray):
        return str(value.tolist() if len(value) <= SHORT else digest(value))
    return str(value) if len(str(value)) < 60 else digest(str(value).encode())


def oracle(llama_cpp: Path, python: str, folder: Path, out: Path, outtype: str, mmproj: bool) -> GGUF:
    """What llama.cpp's converter writes for a directory."""
    command = [python, "convert_hf_to_gguf.py", folder.resolve(), "--outfile", out.resolve(), "--outtype", outtype]
    done = subprocess.run([*command, *["--mmproj"] * mmproj], cwd=llama_cpp, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name} {outtype}: {done.stderr[-2000:]}")
    return open_gguf(out)


def job_name(kind: str, mmproj: bool) -> str:
    return f"mmproj-{kind}" if mmproj else kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default=sys.executable, help="an interpreter with torch and transformers")
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, mmproj in JOBS:
            folder = tiny_hf.make(kind, Path(temporary) / kind)
            for outtype in OUTTYPES:
                out = Path(temporary) / "out.gguf"
                one = described(oracle(given.llama_cpp, given.python, folder, out, outtype, mmproj))
                entry = found.setdefault(job_name(kind, mmproj), {"tensors": {}, "metadata": {}})
                for sort, values in one.items():  # a word where all types agree, else one for each
                    for name, value in values.items():
                        entry[sort].setdefault(name, {})[outtype] = value
            print(kind, "mmproj" if mmproj else "")
    for entry in found.values():
        for values in entry.values():
            values |= {n: next(iter(v.values())) for n, v in values.items() if len(set(v.values())) == 1}
    given.out.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

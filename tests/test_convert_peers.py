"""Against llama.cpp itself: its converter, run anew on every tiny directory, and its engine on what we wrote.

    GEMMA4Q_LLAMACPP=.../llama.cpp pytest -m peers tests/test_convert_peers.py

GEMMA4Q_LLAMACPP is a source directory of llama.cpp, as in the sdist of llama-cpp-python; GEMMA4Q_PEER_PYTHON an
interpreter with torch, transformers and llama-cpp-python, if it is not the one that runs the tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peer import PYTHON, needs_llama_cpp

from gemma4q.convert.convert import planned
from gemma4q.gguf.reader import open_gguf

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import convert_oracle
import tiny_hf

pytestmark = pytest.mark.peers
LOAD = """
import sys, llama_cpp
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
print("loaded" if model else "refused")
"""
RUN = """
import sys, llama_cpp, numpy as np
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, logits_all=True, verbose=False)
model.eval([2, 300, 301, 302])
scores = np.array(model.scores[:4])
scores[:, 5] = -np.inf  # a token of extremes, whose sign is rounding's
print(*scores.argmax(axis=1))
print(*model.tokenize(b"Apache License", add_bos=True))
"""

SEE_AND_HEAR = """
import ctypes, sys, llama_cpp, numpy as np
from llama_cpp import mtmd_cpp as mtmd

def media(context, bitmap):
    marker, chunks = mtmd.mtmd_default_marker(), mtmd.mtmd_input_chunks_init()
    text = mtmd.mtmd_input_text(marker, len(marker), False, True)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
    all_chunks = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
    (chunk,) = [chunk for chunk in all_chunks if mtmd.mtmd_input_chunk_get_type(chunk)]
    assert mtmd.mtmd_encode_chunk(context, chunk) == 0
    count, width = mtmd.mtmd_input_chunk_get_n_tokens(chunk), llama_cpp.llama_model_n_embd(model)
    vectors = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (count * width,))
    assert np.isfinite(vectors).all() and vectors.std() > 0.1
    return count

model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
params = mtmd.mtmd_context_params_default()
params.use_gpu, params.n_threads = False, 1
context = mtmd.mtmd_init_from_file(sys.argv[2].encode(), model, params)
random = np.random.default_rng(1)
image = random.integers(0, 256, 96 * 96 * 3, np.uint8)
sound = random.normal(0, 0.1, 16000).astype(np.float32)
print(media(context, mtmd.mtmd_bitmap_init(96, 96, image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))))
if mtmd.mtmd_support_audio(context):
    audio = sound.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    print(media(context, mtmd.mtmd_bitmap_init_from_audio(len(sound), audio)))
"""


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    if "GEMMA4Q_LLAMACPP" not in os.environ:
        pytest.skip("GEMMA4Q_LLAMACPP names no source directory of llama.cpp")
    return Path(os.environ["GEMMA4Q_LLAMACPP"])


@pytest.mark.parametrize("outtype", convert_oracle.OUTTYPES)
@pytest.mark.parametrize(("kind", "mmproj"), convert_oracle.JOBS)
def test_the_converter_writes_the_same_today(kind, mmproj, outtype, llama_cpp, tmp_path):
    folder = tiny_hf.make(kind, tmp_path / kind)
    theirs = convert_oracle.described(
        convert_oracle.oracle(llama_cpp, PYTHON, folder, tmp_path / "theirs.gguf", outtype, mmproj)
    )
    with planned(folder, tmp_path / "ours.gguf", outtype, mmproj, centroids=False) as conversion:
        conversion.write()
    assert convert_oracle.described(open_gguf(tmp_path / "ours.gguf")) == theirs


def said(program: str, *paths: Path) -> str:
    needs_llama_cpp()
    return subprocess.run([PYTHON, "-c", program, *paths], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("outtype", ["f32", "bf16", "f16", "q8_0"])
@pytest.mark.parametrize("kind", tiny_hf.TINY)
def test_llama_cpp_loads_and_runs_it_and_agrees(kind, outtype, tmp_path):
    import gemma4q

    out = tmp_path / "out.gguf"
    with planned(tiny_hf.make(kind, tmp_path / kind), out, outtype) as conversion:
        conversion.write()
    best, tokens = said(RUN, out).splitlines()
    with gemma4q.load(out, context=64, threads=1) as model:
        logits = np.array(model.logits([2, 300, 301, 302]))
        logits[:, 5] = -np.inf
        assert model.tokenize("Apache License", bos=True) == list(map(int, tokens.split()))
    # Where two tokens are as likely, rounding decides which is the best.
    for row, token in zip(logits, map(int, best.split()), strict=True):
        assert row[token] > row.max() - (0.05 if outtype == "f32" else 1.0)


@pytest.mark.parametrize("kind", tiny_hf.ASSISTANTS)
def test_llama_cpp_loads_assistants_without_centroids_only(kind, tmp_path):
    folder = tiny_hf.make(kind, tmp_path / kind)
    for centroids in (True, False):
        with planned(folder, tmp_path / "out.gguf", centroids=centroids) as conversion:
            conversion.write()
        assert said(LOAD, tmp_path / "out.gguf") == ("refused" if conversion.has_centroids else "loaded")


@pytest.mark.parametrize("outtype", ["bf16", "f16", "q8_0"])
@pytest.mark.parametrize("kind", tiny_hf.TINY)
def test_llama_cpp_sees_and_hears_through_what_we_wrote(kind, outtype, tmp_path):
    """81 vectors of an image, 25 of a second of sound, where the model hears."""
    folder = tiny_hf.make(kind, tmp_path / kind)
    for mmproj in (False, True):
        with planned(folder, tmp_path / f"{mmproj}.gguf", outtype, mmproj) as conversion:
            conversion.write()
    counts = said(SEE_AND_HEAR, tmp_path / "False.gguf", tmp_path / "True.gguf").split()
    assert counts == (["81"] if kind in ("26b", "31b") else ["81", "25"])


@pytest.mark.parametrize("kind", ["26b", "e2b"])
def test_llama_cpp_loads_parts(kind, tmp_path):
    with planned(tiny_hf.make(kind, tmp_path / kind), tmp_path / "out.gguf", "q8_0", part_bytes=60_000) as conversion:
        conversion.write()
    assert len(conversion.files) > 2
    assert said(LOAD, conversion.files[0].path) == "loaded"

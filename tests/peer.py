"""Which interpreter has llama-cpp-python: GEMMA4Q_PEER_PYTHON, or the one that runs the tests."""

import os
import sys

import pytest

PYTHON = os.environ.get("GEMMA4Q_PEER_PYTHON", sys.executable)


def needs_llama_cpp() -> None:
    """Skips the test where nobody said which interpreter has it, and this one has not."""
    if sys.executable == PYTHON:
        pytest.importorskip("llama_cpp")

"""What every test file may ask for, and how tests are started.

They may be started in the background, where a shell ignores Ctrl-C; what they start must not inherit that.
"""

import os
import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def quick_disk(monkeypatch) -> None:
    """Nothing waits for the disk; that files are flushed before they are renamed is tested by itself."""
    monkeypatch.setattr(os, "fsync", lambda fileno: None)


@pytest.fixture(scope="session")
def halves(tmp_path_factory) -> Path:
    """A folder with the shipped models in F16."""
    from quantized import in_halves

    return in_halves(tmp_path_factory.mktemp("halves"))

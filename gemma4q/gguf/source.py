"""One file of a model, opened and mapped: read-only, a regular file, and recognised when it is something else.

The reader owns what the bytes mean; this file owns how they are reached and whether they are still the same.
"""

import mmap
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import Gemma4qError

MAGIC = b"GGUF"

# First bytes of what people hand over instead of a GGUF file.
_OTHER_FILES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint: convert it to GGUF first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"tjgg", "a GGML file from before GGUF: download or convert the model again"),
    (b"lmgg", "a GGML file from before GGUF: download or convert the model again"),
    (b"fmgg", "a GGML file from before GGUF: download or convert the model again"),
    (b"FUGG", "a big-endian GGUF file: convert it to little-endian"),
    (b"<!doctype", "a web page: the download brought no model"),
    (b"<html", "a web page: the download brought no model"),
    (b"\x7felf", "a program"),
    (b"{", "a JSON text"),
)


@dataclass(frozen=True)
class Source:
    """A mapped file. `bytes` is uint8 [size] over it, read-only; `fileno` stays open as long as this object lives."""

    path: Path
    fileno: int
    bytes: np.ndarray
    opened_as: tuple[int, int, int, int]

    @property
    def address(self) -> int:
        """Where the mapping begins in memory; it is `len(self.bytes)` long."""
        return self.bytes.ctypes.data

    def read(self, offset: int, count: int) -> np.ndarray:
        """uint8 [count] from byte `offset` on, read and not mapped: raises model_changed where the file became shorter.

        What was read leaves no page in this process, and a file that shrinks is an error and no crash.
        """
        out, done = np.empty(count, np.uint8), 0
        while done < count:
            got = os.preadv(self.fileno, [out[done:]], offset + done)
            if got == 0:
                raise Gemma4qError("model_changed", f"{self.path} became shorter while it was read")
            done += got
        return out

    def identity(self) -> tuple[int, int, int, int]:
        """(device, inode, size, mtime in ns) of the open file as it is now; `opened_as` is what it was."""
        return _identity(os.fstat(self.fileno))


def open_source(path: str | os.PathLike) -> Source:
    """Opens and maps a regular file. Raises not_found, not_readable, not_a_file or not_gguf (an empty file)."""
    path = Path(path)
    try:
        fileno = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Gemma4qError("not_found", f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise Gemma4qError("not_readable", f"{path}: {reason}") from None
    try:
        status = os.fstat(fileno)
        if not stat.S_ISREG(status.st_mode):
            raise Gemma4qError("not_a_file", f"{path} is {_file_kind(status.st_mode)}, not a regular file")
        if status.st_size == 0:
            raise Gemma4qError("not_gguf", f"{path} is empty")
        mapped = np.frombuffer(mmap.mmap(fileno, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)
    except OSError as error:
        os.close(fileno)
        raise Gemma4qError("not_readable", f"{path}: {error.strerror}") from None
    except Gemma4qError:
        os.close(fileno)
        raise
    source = Source(path, fileno, mapped, _identity(status))
    weakref.finalize(source, os.close, fileno)
    return source


def what_it_is(head: bytes) -> str:
    """What a file that is no GGUF looks like, from its first bytes, with what to do about it."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, meaning in _OTHER_FILES:
        if head.startswith(start) or text.startswith(start.lower()):
            return f"it looks like {meaning}"
    if head[8:10] == b'{"':
        return "it looks like a safetensors file: convert it to GGUF first"
    if not any(head):
        return "it begins with zeros: the download is incomplete or the disk is damaged"
    return f"it begins with {head[:4]!r} instead of {MAGIC!r}"


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _file_kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")

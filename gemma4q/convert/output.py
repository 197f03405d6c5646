"""Files that appear whole or not at all: written beside their names, then renamed, all parts of a model together.

Owns room on the disk, what an interruption leaves, and that no input is overwritten; what is written is the caller's.
A `NAME.part` that a killed run left is written over, or swept away, by the next run that writes NAME.
"""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from ..errors import Gemma4qError
from ..gguf.source import MAGIC
from ..gguf.writer import TensorData, Types, header, write_tensors

SUFFIX = ".part"
Progress = Callable[[int, int], None]
Late = Callable[[Path], Mapping[str, object]]


@dataclass(frozen=True)
class Planned:
    """A GGUF file to be."""

    path: Path
    metadata: Mapping[str, object]
    types: Mapping[str, Types]
    tensors: Sequence[TensorData]

    @property
    def alignment(self) -> int:
        return self.metadata.get("general.alignment", 32)

    @cached_property
    def header(self) -> bytes:
        return header(self.metadata, self.tensors, self.types, self.alignment)

    @property
    def nbytes(self) -> int:
        align = self.alignment
        return len(self.header) + sum(-(-tensor.nbytes // align) * align for tensor in self.tensors)


def write_files(
    planned: Sequence[Planned], inputs: Iterable[int], progress: Progress | None = None, late: Late | None = None
) -> None:
    """Writes all files, or none; files of the same names are replaced once all is written.

    `inputs`: descriptors of open files that are read meanwhile and must not be written to. `progress` is told how many
    bytes of how many are written. `late` is told where the first file lies when all is written, and gives keys of it
    that are known only then, in place of others as long. Raises same_file, not_gguf (a file of another sort has the
    name), not_found, not_writable, no_space, busy, io; and what making the tensors and `late` raise.
    """
    for file in planned:
        check_target(file.path, inputs)
    total = sum(file.nbytes for file in planned)
    parts: list[tuple[Path, BinaryIO]] = []
    try:
        _sweep(planned)
        for file in planned:
            parts.append(open_part(file.path))
        check_room(planned[0].path.parent, total)
        done = 0
        for file, (_, out) in zip(planned, parts, strict=True):
            out.write(file.header)
            for tensor in file.tensors:
                write_tensors(out, [_told(tensor, progress, done, total)], file.alignment)
                done += tensor.nbytes
            out.flush()
            os.fsync(out.fileno())
        if late:
            _fill(planned[0], *parts[0], late)
        appear([file.path for file in planned], [path for path, _ in parts])
    except BaseException as error:
        for path, _ in parts:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained(error, planned[0].path) from None
        raise
    finally:
        for _, out in parts:
            with contextlib.suppress(OSError):
                out.close()


def _fill(file: Planned, part: Path, out: BinaryIO, late: Late) -> None:
    """Puts the keys that `late` gives into a file that is whole but for them."""
    known = replace(file, metadata={**file.metadata, **late(part)}).header
    if len(known) != len(file.header):
        raise ValueError("keys that are known late take as many bytes as those they replace")
    out.seek(0)
    out.write(known)
    out.flush()
    os.fsync(out.fileno())


def _told(tensor: TensorData, progress: Progress | None, before: int, total: int) -> TensorData:
    """A tensor whose chunks are counted as they are written."""
    if progress is None:
        return tensor

    def chunks() -> Iterator:
        done = before
        for chunk in tensor.chunks():
            yield chunk
            done += memoryview(chunk).nbytes
            progress(done, total)

    return replace(tensor, chunks=chunks)


def check_target(path: Path, inputs: Iterable[int], magic: bytes = MAGIC, sort: str = "GGUF") -> None:
    """That a file may be written there: a new one, or in place of one of its `sort` that is not being read.

    Raises not_a_file, not_found, same_file, and not_gguf (or another `sort`) for a file of another sort.
    """
    if path.is_dir():
        raise Gemma4qError("not_a_file", f"{path} is a directory")
    if not path.parent.is_dir():
        raise Gemma4qError("not_found", f"{path.parent}: there is no such directory")
    if path.exists():
        if not path.is_file():
            raise Gemma4qError("not_a_file", f"{path} is no regular file")
        found = os.stat(path)
        if any((s.st_dev, s.st_ino) == (found.st_dev, found.st_ino) for s in map(os.fstat, inputs)):
            raise Gemma4qError("same_file", f"{path} is what is read: choose another name")
        with open(path, "rb") as file:
            if file.read(len(magic)) not in (magic, b""):
                kind = f"not_{sort.lower()}"
                raise Gemma4qError(kind, f"{path} exists and is no {sort} file: choose another name")


def open_part(path: Path) -> tuple[Path, BinaryIO]:
    """The file beside `path`, empty and ours alone."""
    part = path.with_name(path.name + SUFFIX)
    fileno = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    out = open(fileno, "wb", buffering=1 << 20)  # noqa: SIM115 (the caller closes it)
    if not _locked(out):
        out.close()
        raise Gemma4qError("busy", f"{part} is being written by another process")
    out.truncate(0)
    return part, out


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write, which is at `path` when it is whole, in the place of an older one, or never.

    Raises not_writable, no_space, busy, io.
    """
    part, out = None, None
    try:
        part, out = open_part(path)
        yield out
        out.flush()
        os.fsync(out.fileno())
        appear([path], [part])
    except OSError as error:
        raise explained(error, path) from None
    finally:
        if out is not None:
            part.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk does not take what is in the buffer either
                out.close()


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sweep(planned: Sequence[Planned]) -> None:
    """Removes what a killed run left of a model of this name cut into other parts."""
    path = planned[0].path
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.gguf" + re.escape(SUFFIX))
    for stale in path.parent.iterdir():
        if ours.fullmatch(stale.name) and stale.is_file() and not stale.is_symlink():
            with open(stale, "ab") as file:
                if _locked(file):
                    stale.unlink(missing_ok=True)


def check_room(folder: Path, needed: int) -> None:
    """Raises no_space."""
    status = os.statvfs(folder)
    if (free := status.f_bavail * status.f_frsize) < needed:
        raise Gemma4qError("no_space", f"{folder} has {free:,} bytes free; {needed:,} are needed")


def appear(paths: Sequence[Path], parts: Sequence[Path]) -> None:
    """Renames all parts. The first is last to come and first to go: without it the others are no model."""
    if len(paths) > 1:
        paths[0].unlink(missing_ok=True)
    done: list[Path] = []
    try:
        for path, part in reversed(list(zip(paths, parts, strict=True))):
            os.replace(part, path)
            done.append(path)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system knows it
        folder = os.open(paths[0].parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def explained(error: OSError, path: Path) -> Gemma4qError:
    """What kept `path` from being written: no_space, not_writable or io."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Gemma4qError("no_space", f"{path}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG):
        return Gemma4qError("not_writable", f"{path}: {error.strerror}")
    return Gemma4qError("io", f"{path}: {error.strerror or error}")

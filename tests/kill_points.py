"""Converts a directory again and again, each time in a child that kills itself one step later; a program of the tests.

    python kill_points.py HF_DIR OUT [PART_BYTES]

A step is a piece of data written, a file flushed, renamed or removed. Prints a JSON list: for each run how it ended and
the files there were then, as {name: bytes}. The last run was not killed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from gemma4q.convert import output
from gemma4q.convert.convert import planned


class Steps:
    """Counts steps, and kills the process before the n-th."""

    def __init__(self, deadly: int):
        self.left = deadly

    def __call__(self, function):
        def stepping(*arguments, **options):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return stepping


def run(folder: str, out: str, part_bytes: int | None, deadly: int) -> bool:
    """Whether a child ended by itself."""
    child = os.fork()
    if child == 0:
        step = Steps(deadly)
        output.write_tensors = step(output.write_tensors)
        os.fsync = step(lambda fileno: None)  # a kill loses nothing that was written, and disks are slow
        os.replace, os.unlink = step(os.replace), step(os.unlink)
        with planned(folder, out, "q8_0", part_bytes=part_bytes) as conversion:
            conversion.write()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def main() -> None:
    folder, out, *rest = sys.argv[1:]
    seen, whole = [], False
    while not whole:
        whole = run(folder, out, int(rest[0]) if rest else None, len(seen))
        files = sorted(Path(out).parent.glob("*.gguf*"))
        seen.append({"whole": whole, "files": {path.name: path.stat().st_size for path in files}})
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

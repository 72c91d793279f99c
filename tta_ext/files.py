"""Files as users name them: read whole, written whole, and checked before the work."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

__all__ = ["REPORT_MARK", "check_output", "decoded", "read_text", "write_file"]

# How every report begins: its first object, not an inner one, has the version that wrote it. No
# journal does, whose lines begin with a key.
REPORT_MARK = re.compile(
    rb'\s*(?:\[\s*)?\{(?!"key")(?:"(?:[^"\\]|\\.)*"|[^"{}])*?"run":\s*\{\s*"tta_ext":'
)


def check_output(path: Path | None, mark: re.Pattern[bytes] = REPORT_MARK) -> None:
    """An error before the work if a file cannot be written after it, or should not be.

    Args:
        path: the file; None: none was asked for. Only a regular file is looked into.
        mark: how a file of ours begins, its last 64 KiB put behind the first.

    Raises:
        ValueError: it is there, and holds something of others.
        OSError: it cannot be written.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_fifo():
        return  # whoever reads may not have come yet
    there = path.exists()
    if there and path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            ends = file.read(1 << 16)
            file.seek(max(len(ends), path.stat().st_size - (1 << 16)))
            if not mark.match(ends + file.read()):
                raise ValueError(f"{path} is no earlier result of this command: it is kept")
    with path.open("ab"):
        pass
    if not there:
        path.unlink()


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, in UTF-8 and with line feeds.

    Raises:
        OSError: names the file, as that of a full disk does not by itself.
    """
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_text(path: str | Path) -> str:
    """A file's text, its byte order mark and nothing else left out.

    Args:
        path: a file or a pipe; "-" is standard input.

    Raises:
        ValueError: it is not UTF-8, or a device, whose end may never come.
    """
    if str(path) == "-":
        path = "standard input"
        # Not its text layer, which would end lines at carriage returns too.
        content = sys.stdin.buffer.read()
    else:
        with Path(path).open("rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path} is a device, expected a file; - is standard input")
            content = file.read()
    return decoded(content, path).removeprefix("\ufeff")


def decoded(content: bytes, path: str | Path) -> str:
    """The text of a file's bytes; ``ValueError`` names the file that is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None

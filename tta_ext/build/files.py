"""What may be trusted on disk: folders that nobody else can write, files that are as recorded.

A library is code: whoever can put one where it is looked for runs as this user, and ``dlopen`` of a
damaged one kills the process. So nothing is loaded before its folder and its bytes were looked at.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tta_ext.build.toolchain import BuildError


def user() -> int:
    """The number of the user that must own what is trusted; 0 where the system has none."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _shared(found: os.stat_result) -> str:
    """Why others could have written it; empty if only this user could."""
    if not hasattr(os, "geteuid"):
        return ""
    if found.st_uid != user():
        return f"belongs to user {found.st_uid}, not to {user()} that runs this"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def shared_folder(path: Path) -> str:
    """Why a path is not a folder that only this user can write; empty if it is."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    return _shared(found)


def private_folder(path: Path, name: str, remedy: str) -> Path:
    """The folder itself, made if it is not there; only this user can write it.

    Args:
        path: where it is.
        name: what messages call it.
        remedy: what puts it elsewhere.

    Raises:
        BuildError: it is a link, another user's, writable for others, or cannot be made.
    """
    try:
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
        why = shared_folder(path)
    except OSError as error:
        text = f"cannot use the {name} {path} ({error}); mend it with: {remedy}"
        raise BuildError(text) from error
    if why:
        chmod = f"chmod go-w {path}, or " if why.startswith("can be") else ""
        raise BuildError(
            f"the {name} {path} {why}, so what it holds cannot be trusted; "
            f"mend it with: {chmod}{remedy}"
        )
    return path


def _read(path: Path) -> tuple[os.stat_result, bytes]:
    """A regular file's state and content; never waits for a pipe, never follows a link."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a regular file")
        return found, file.read()


def read_private(path: Path) -> bytes:
    """A file's content; ``OSError`` unless it is a regular file that only this user can write."""
    found, content = _read(path)
    if why := _shared(found):
        raise OSError(f"{path} {why}")
    return content


def stamp(content: bytes) -> dict[str, Any]:
    """What the record beside a library says about its bytes."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def damage(path: Path, record: Mapping[str, Any], private: bool = False) -> str:
    """Why a file is not the one that its record stamps; empty if it is.

    Args:
        private: others must not be able to write it either.
    """
    try:
        content = read_private(path) if private else _read(path)[1]
    except OSError as error:
        return str(error)
    found = stamp(content)
    if any(record.get(key) != value for key, value in found.items()):
        return f"{path.name} is not the file that was recorded ({found['size']} bytes)"
    return ""


def write_synced(path: Path, content: bytes) -> None:
    """Write a file, private to this user, that survives a power cut once this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def sync(path: Path) -> None:
    """Have the disk keep a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

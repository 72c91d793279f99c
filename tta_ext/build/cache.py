"""The per-user cache of compiled libraries.

A library's folder is named by the hash of all that went into it, so a stale library cannot be
picked up and two environments cannot disturb each other. The folder appears by one rename, its
record written last: a reader sees a whole library or none, also when a builder is killed half-way
or the power fails. What is there is looked at before it is used (:mod:`tta_ext.build.files`); an
entry that is not as it was written is put away and built anew. A lock keeps many processes that
start together from compiling the same thing; it sits on the local disk, because home directories
may not honour locks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tta_ext.build import files
from tta_ext.build.toolchain import BuildError, CompilerError, Recipe, seconds

logger = logging.getLogger("tta_ext")

_STALE_SECONDS = 24 * 3600.0
_POLL_SECONDS = 0.05
#: What a build may need of the disk: a full one is told before minutes of compiling, not after.
_ROOM = 64 << 20
_ELSEWHERE = "export TTA_EXT_CACHE_DIR=<a folder that only you can write>"

# Lock files that this process holds. A child of a fork has copies of their descriptors, which would
# keep the locks when this process is killed.
_held: set[int] = set()


def _drop_copies() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_copies)


def cache_dir() -> Path:
    """``TTA_EXT_CACHE_DIR``, else ``tta_ext`` in the platform's per-user cache folder.

    Raises:
        BuildError: nothing says where this user's home is.
    """
    named = os.environ.get("TTA_EXT_CACHE_DIR")
    try:
        if named:
            return Path(named).expanduser().absolute()
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        where = f"TTA_EXT_CACHE_DIR={named!r}" if named else f"user {files.user()}"
        raise BuildError(
            f"no home folder for {where}: {error}; mend it with: {_ELSEWHERE}"
        ) from error
    return base / "tta_ext"


def cache_folder() -> Path:
    """:func:`cache_dir`, made if need be, and found to be this user's alone.

    Raises:
        BuildError: it is not, or cannot be made.
    """
    return files.private_folder(cache_dir(), "cache folder", _ELSEWHERE)


@contextmanager
def _named(what: str, remedy: str = _ELSEWHERE) -> Iterator[None]:
    """``OSError`` as a sentence that says what failed."""
    try:
        yield
    except OSError as error:
        raise BuildError(f"{what} ({error}); mend it with: {remedy}") from error


@contextmanager
def _build_lock(target: Path) -> Iterator[None]:
    """Hold the lock of one entry's build; ``BuildError`` names its owner when it is not free in
    time. The owner's name stands in the lock file.
    """
    import fcntl

    remedy = "export TMPDIR=<a local folder that you can write>"
    timeout = seconds("TTA_EXT_LOCK_TIMEOUT", 600.0)
    with _named("no folder for temporary files", remedy):
        temporary = Path(tempfile.gettempdir())
    folder = files.private_folder(temporary / f"tta_ext-{files.user()}", "lock folder", remedy)
    # A build in another cache folder is nothing to wait for.
    path = folder / f"{hashlib.sha256(os.fsencode(target)).hexdigest()}.lock"
    with _named(f"cannot lock {path}", remedy):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(path, flags, 0o600)
    try:
        limit: float | None = None
        while True:
            with _named(f"cannot lock {path}", remedy):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    pass
            owner = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
            if limit is None:
                logger.warning("tta_ext: waiting for %s, which is compiling the kernels", owner)
                limit = time.monotonic() + timeout
            if time.monotonic() >= limit:
                raise BuildError(
                    f"waited {timeout:.0f} s for {owner} to compile the kernels; "
                    f"mend it with: end that process, or export TTA_EXT_LOCK_TIMEOUT=<more "
                    f"seconds> (lock file {path})"
                )
            time.sleep(_POLL_SECONDS)
        _held.add(lock)
        with _named(f"cannot write the lock file {path}", remedy):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        if lock in _held:
            _held.discard(lock)
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _sweep(folder: Path) -> None:
    """Remove what builders that were killed left behind."""
    for path in folder.glob(".tmp-*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Tells one writing of a file from another, whatever the clocks say; None without a file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _fault(entry: Path, library: str) -> str:
    """Why an entry's library must not be loaded; empty if it may."""
    try:
        if why := files.shared_folder(entry):
            return f"{entry} {why}"
        record = json.loads(files.read_private(entry / "build.json"))
        return files.damage(entry / library, record if isinstance(record, dict) else {}, True)
    except FileNotFoundError as error:
        return f"{error.filename} is not there"
    except (OSError, ValueError) as error:
        return str(error)


def _put_away(entry: Path, why: str) -> None:
    """Take what is no library out of an entry's place."""
    logger.warning("tta_ext: %s is built anew: %s", entry, why)
    away = Path(tempfile.mkdtemp(prefix=".tmp-broken-", dir=entry.parent))
    entry.rename(away / entry.name)
    _remove(away)


def _of_compilers() -> float:
    """Processor time of ended child processes, which tells more than a clock on a busy machine."""
    times = os.times()
    return times.children_user + times.children_system


def get(recipe: Recipe, stem: str) -> tuple[Path, bool]:
    """The library of a recipe from the cache, compiled first if it is not there whole.

    Args:
        recipe: what the library is made of; its key names the folder.
        stem: readable start of the folder's name.

    Returns:
        (path of the library, whether this call compiled it).

    Raises:
        BuildError: compilation failed, the cache cannot be written or trusted, or the lock was not
            free in time.
    """
    cache = cache_folder()
    target = cache / f"{stem}-{recipe.key()}"
    path = target / recipe.library
    if os.statvfs(cache).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise BuildError(
            f"the cache folder {cache} is on a disk from which no code may run (mounted noexec); "
            f"mend it with: {_ELSEWHERE.replace('write>', 'write, on another disk>')}"
        )
    if not _fault(target, recipe.library):
        return path, False
    log = cache / f"{target.name}.log"
    before = _identity(log)
    with _build_lock(target):
        why = _fault(target, recipe.library)
        if not why:
            return path, False
        if _identity(log) not in (None, before):
            # It failed while we waited; failing again would only take as long again.
            raise CompilerError(log.read_text(errors="replace"))
        with _named(f"cannot write the cache folder {cache}"):
            _sweep(cache)
            if os.path.lexists(target):
                _put_away(target, why)
            free = shutil.disk_usage(cache).free
        if free < _ROOM:
            raise BuildError(
                f"the disk of the cache folder {cache} is full ({free >> 20} MiB left, a build "
                f"needs {_ROOM >> 20}); mend it with: free some, or {_ELSEWHERE}"
            )
        logger.warning(
            "tta_ext: compiling %d files once with %s into %s",
            len(recipe.sources),
            recipe.compiler.version,
            target,
        )
        start, spent = time.perf_counter(), _of_compilers()
        try:
            with _named(f"cannot write the cache folder {cache}"):
                _fill(target, recipe)
        except BuildError as error:
            with suppress(OSError):  # the failure counts, not that it cannot be noted
                log.write_text(str(error), encoding="utf-8")
            raise
        logger.warning(
            "tta_ext: compiled in %.0f s, %.0f s of processor time",
            time.perf_counter() - start,
            _of_compilers() - spent,
        )
        with suppress(OSError):
            log.unlink(missing_ok=True)
    return path, True


def _fill(target: Path, recipe: Recipe) -> None:
    """Make the library's folder elsewhere and put it into its place whole."""
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{os.getpid()}-", dir=target.parent))
    try:
        library = folder / recipe.library
        recipe.compile(library)
        library.chmod(0o700)
        files.sync(library)
        record = {
            "compiler": recipe.compiler.version,
            "command": recipe.compiler.command,
            "flags": list(recipe.flags),
            **recipe.record,
            **files.stamp(library.read_bytes()),
        }
        files.write_synced(folder / "build.json", json.dumps(record, indent=1).encode())
        files.sync(folder)
        try:
            folder.rename(target)
        except OSError:
            # Another machine that shares this cache may have been first; its library is as good as
            # ours.
            if _fault(target, recipe.library):
                raise
        files.sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

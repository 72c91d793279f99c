"""The per-user cache of compiled libraries.

A library's folder is named by the hash of all that went into it, so a stale library cannot be
picked up and two environments cannot disturb each other. The folder appears by one rename: a reader
sees a whole library or none, also when a builder is killed half-way. A lock keeps many processes
that start together from compiling the same thing; it sits on the local disk, because home
directories may not honour locks.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tta_ext.build.toolchain import BuildError, Recipe

logger = logging.getLogger("tta_ext")

_STALE_SECONDS = 24 * 3600.0


def cache_dir() -> Path:
    """``TTA_EXT_CACHE_DIR``, else ``tta_ext`` in the platform's per-user cache folder."""
    named = os.environ.get("TTA_EXT_CACHE_DIR")
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tta_ext"


@contextmanager
def _build_lock(name: str) -> Iterator[None]:
    """Hold the lock of one build; ``BuildError`` names its owner when it is not free in time."""
    # Not there when setup.py compiles in an isolated environment.
    from filelock import FileLock, Timeout

    timeout = float(os.environ.get("TTA_EXT_LOCK_TIMEOUT", "600"))
    folder = Path(tempfile.gettempdir()) / f"tta_ext-{getpass.getuser()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}.lock"
    owner = path.with_suffix(".owner")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("tta_ext: waiting for %s, which is compiling the kernels", _owner(owner))
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise BuildError(
                f"waited {timeout:.0f} s for {_owner(owner)} to compile the kernels; "
                f"mend it with: end that process, or export TTA_EXT_LOCK_TIMEOUT=<more seconds> "
                f"(lock file {path})"
            ) from None
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"


def _sweep(folder: Path) -> None:
    """Remove what builders that were killed left behind."""
    for path in folder.glob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def get(recipe: Recipe, stem: str) -> tuple[Path, bool]:
    """The library of a recipe from the cache, compiled first if it is not there.

    Args:
        recipe: what the library is made of; its key names the folder.
        stem: readable start of the folder's name.

    Returns:
        (path of the library, whether this call compiled it).

    Raises:
        BuildError: compilation failed, the cache cannot be written, or the lock was not free
            in time.
    """
    cache = cache_dir()
    target = cache / f"{stem}-{recipe.key()}"
    path = target / recipe.library
    if path.exists():
        return path, False
    asked = time.time()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _build_lock(target.name):
            if path.exists():
                return path, False
            log = cache / f"{target.name}.log"
            if log.exists() and log.stat().st_mtime >= asked:
                # It failed while we waited; failing again would only take as long again.
                raise BuildError(log.read_text())
            _sweep(cache)
            logger.warning(
                "tta_ext: compiling %d files once with %s into %s",
                len(recipe.sources),
                recipe.compiler.version,
                target,
            )
            try:
                _fill(target, recipe)
            except BuildError as error:
                log.write_text(str(error))
                raise
            log.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot write the cache folder {cache} ({error}); "
            "mend it with: export TTA_EXT_CACHE_DIR=<a folder you can write>"
        ) from error
    return path, True


def _fill(target: Path, recipe: Recipe) -> None:
    """Make the library's folder elsewhere and put it into its place whole."""
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{os.getpid()}-", dir=target.parent))
    try:
        recipe.compile(folder / recipe.library)
        record = {
            "compiler": recipe.compiler.version,
            "command": recipe.compiler.command,
            "flags": list(recipe.flags),
            **recipe.record,
        }
        (folder / "build.json").write_text(json.dumps(record, indent=1))
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not (target / recipe.library).exists():
                raise
            # Another machine that shares this cache was first; its library is as good as ours.
    finally:
        shutil.rmtree(folder, ignore_errors=True)

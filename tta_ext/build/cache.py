"""Loading the native CPU library: prebuilt in the wheel, cached, or compiled on first use.

:mod:`tta_ext.jit_cuda` does the same for the CUDA library with the functions of this module.

Nothing happens at import. The ops layer calls :func:`load` before its first native op. A build
lands in a per-user cache under a name that hashes all that went into it, so a stale library cannot
be picked up and two environments cannot disturb each other. The folder appears by one rename: a
reader sees a whole library or none, also when a builder is killed half-way. A lock keeps many
processes that start together from compiling the same thing; it sits on the local disk, because
home directories may not honour locks.

Environment: ``TTA_EXT_NATIVE`` = auto (default), 0 (never load), 1 (fail loudly);
``TTA_EXT_CACHE_DIR``; ``TTA_EXT_LOCK_TIMEOUT`` (seconds, default 600); ``CXX``; ``MAX_JOBS``.
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
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tta_ext import _compile
from tta_ext._compile import BuildError

logger = logging.getLogger("tta_ext")

#: What a library was built with, in a file beside it.
RECORD = "build.json"

_STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class LoadResult:
    """What :func:`load` or :func:`tta_ext.jit_cuda.load` found.

    Attributes:
        loaded: the library's ops are registered.
        reason: why they are not, with the command that mends it; where they came from if they are.
        path: the library, if loaded.
        seconds: time the loading took, compilation included.
        built: this call compiled it.
    """

    loaded: bool
    reason: str
    path: Path | None
    seconds: float
    built: bool


class NativeWarning(RuntimeWarning):
    """The native library is not there and the slower reference serves instead."""


class Once:
    """A library's one try at loading in a process, whichever thread asks first.

    Attributes:
        result: what came of it; None before.
    """

    def __init__(self, attempt: Callable[[], LoadResult]) -> None:
        self.result: LoadResult | None = None
        self._attempt = attempt
        self._fresh_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._fresh_lock)

    def _fresh_lock(self) -> None:
        # A fork may copy the lock while another thread holds it; nobody would release it in the
        # child.
        self._lock = threading.Lock()

    def __call__(self) -> LoadResult:
        if self.result is not None:
            return self.result
        with self._lock:
            if self.result is None:
                self.result = self._attempt()
        return self.result


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


def _lock_dir() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tta_ext-{getpass.getuser()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def _build_lock(name: str) -> Iterator[None]:
    """Hold the lock of one build; ``BuildError`` names its owner when it is not free in time."""
    from filelock import FileLock, Timeout

    timeout = float(os.environ.get("TTA_EXT_LOCK_TIMEOUT", "600"))
    path = _lock_dir() / f"{name}.lock"
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


def build(
    sources: Sequence[Path],
    key: str,
    *,
    compiler: _compile.Compiler,
    include_dirs: Sequence[Path],
    torch_root: Path | None,
    flags: Sequence[str] = _compile.CXX_FLAGS,
    link: Sequence[str] | None = None,
    stem: str = "cpu",
    library: str = _compile.LIBRARY_NAME,
    facts: Mapping[str, object] | None = None,
) -> tuple[Path, bool]:
    """The library of ``key`` from the cache, compiled first if it is not there.

    Args:
        sources: C++ files.
        key: hash that names everything the build depends on.
        compiler, include_dirs, torch_root, flags, link: as in
            :func:`tta_ext._compile.compile_library`.
        stem: readable start of the cache folder's name.
        library: file name of the library.
        facts: what ``build.json`` beside the library shall say besides compiler and flags.

    Returns:
        (path of the library, whether this call compiled it).

    Raises:
        BuildError: compilation failed, the cache cannot be written, or the lock was not free
            in time.
    """
    cache = cache_dir()
    target = cache / f"{stem}-{key}"
    path = target / library
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
                len(sources),
                compiler.version,
                target,
            )

            def make(folder: Path) -> None:
                _compile.compile_library(
                    compiler,
                    sources,
                    folder / library,
                    include_dirs=include_dirs,
                    torch_root=torch_root,
                    flags=flags,
                    link=link,
                )
                record = {
                    "compiler": compiler.version,
                    "command": compiler.command,
                    "flags": list(flags),
                    **(facts or {}),
                }
                (folder / RECORD).write_text(json.dumps(record, indent=1))

            _fill(target, library, log, make)
    except OSError as error:
        raise BuildError(
            f"cannot write the cache folder {cache} ({error}); "
            "mend it with: export TTA_EXT_CACHE_DIR=<a folder you can write>"
        ) from error
    return path, True


def _fill(target: Path, library: str, log: Path, make: Callable[[Path], None]) -> None:
    """Have a folder made elsewhere and put it into its place whole."""
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{os.getpid()}-", dir=target.parent))
    try:
        make(folder)
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not (target / library).exists():
                raise
            # Another machine that shares this cache was first; its library is as good as ours.
    except BuildError as error:
        log.write_text(str(error))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)


def prebuilt(library: str, digest: Callable[[Path], str]) -> tuple[Path | None, str]:
    """The library inside the package, if it was built from the sources beside it; else why not."""
    path = Path(__file__).resolve().parent / library
    if not path.exists():
        return None, "the package holds no prebuilt library"
    try:
        record = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        return None, f"the prebuilt library has no readable record ({error})"
    if record.get("digest") != digest(_compile.source_root()):
        return None, "the prebuilt library is older than the C++ sources"
    return path, ""


def _torch_too_old(version: str) -> str | None:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers >= _compile.MINIMUM_TORCH:
        return None
    least = ".".join(map(str, _compile.MINIMUM_TORCH))
    return (
        f"torch {version} is older than {least}, the first with the stable ABI that the kernels "
        f"use; mend it with: pip install 'torch>={least}'"
    )


def check_torch() -> None:
    """``BuildError`` if torch has no stable ABI that the libraries can use."""
    import torch

    old = _torch_too_old(str(torch.__version__))
    if old:
        raise BuildError(old)


def open_built(make: Callable[[], tuple[Path, bool]]) -> tuple[Path, bool]:
    """Load what ``make`` built or found; a damaged cache entry is built once more.

    Returns:
        (path of the library, whether it was compiled now).
    """
    import torch

    for attempt in (1, 2):
        path, built = make()
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            # A damaged cache entry (a full or failing disk): one new build, then give up.
            if built or attempt == 2:
                raise BuildError(f"the compiled library {path} does not load ({error})") from error
            shutil.rmtree(path.parent, ignore_errors=True)
            continue
        return path, built
    raise AssertionError("unreachable")


def _load() -> tuple[Path, bool, str]:
    import torch

    check_torch()
    path, why = prebuilt(_compile.LIBRARY_NAME, _compile.source_digest)
    if path is not None:
        try:
            torch.ops.load_library(str(path))
            return path, False, "prebuilt in the package"
        except OSError as error:
            why = f"the prebuilt library does not load ({error})"
    if sys.platform == "win32":
        raise BuildError(f"{why}, and compiling on first use is not supported on Windows; use WSL")
    root = _compile.source_root()
    compiler = _compile.find_compiler()
    key = _compile.build_key(root, compiler, str(torch.__version__))

    def make() -> tuple[Path, bool]:
        return build(
            _compile.cpu_sources(root),
            key,
            compiler=compiler,
            include_dirs=[root],
            torch_root=Path(torch.__file__).resolve().parent,
        )

    path, built = open_built(make)
    return path, built, f"{'compiled' if built else 'found'} in the cache; {why}"


def summary(error: Exception, mend: str | None = None) -> str:
    """One line for the user: the compiler's first error if it is a compiler's output.

    ``mend`` is the command that may mend the latter, another C++ compiler by default.
    """
    text = str(error)
    lines = text.splitlines()
    if len(lines) <= 1:
        return text
    first = next((line.strip() for line in lines[1:] if "error:" in line), lines[-1].strip())
    return f"the compiler failed: {first} (whole output in {cache_dir()}/*.log); mend it with: " + (
        mend or f"export CXX=<a C++17 compiler>, or {_compile.install_hint()}"
    )


def load() -> LoadResult:
    """Load the native CPU library once per process: prebuilt, cached, or compiled now.

    Safe to call from many threads and processes at once; later calls return the first call's
    result.

    Returns:
        LoadResult; ``loaded`` is False where there is no compiler or ``TTA_EXT_NATIVE=0``. The
        former warns once (:class:`NativeWarning`).

    Raises:
        RuntimeError: ``TTA_EXT_NATIVE=1`` and the library cannot be had.
        ValueError: ``TTA_EXT_NATIVE`` has another value than auto, 0, 1.
    """
    return _once()


def attempt(
    variable: str,
    load: Callable[[str], tuple[Path, bool, str]],
    *,
    loss: str,
    mend: str | None = None,
    wanted_here: Callable[[], bool] = lambda: True,
) -> LoadResult:
    """One try at a library, as its environment variable wants it; for a ``load()`` to keep.

    Args:
        variable: the library's switch: auto, 0 or 1.
        load: given the switch, loads the library; its path, whether it was compiled now, and how
            it was come by.
        loss: what happens without the library, for the warning.
        mend: as in :func:`summary`.
        wanted_here: whether a failure is worth a warning.

    Raises:
        RuntimeError: the switch is 1 and the library cannot be had.
        ValueError: the switch has another value.
    """
    wanted = _compile.switch(variable)
    if wanted == "0":
        return LoadResult(False, f"switched off by {variable}=0", None, 0.0, False)
    start = time.perf_counter()
    try:
        path, built, reason = load(wanted)
    except (BuildError, OSError) as error:
        reason = summary(error, mend)
        if wanted == "1":
            raise RuntimeError(f"{variable}=1, but {reason}") from error
        if wanted_here():
            # Named after whoever called load().
            warnings.warn(f"{loss}, which is much slower: {reason}", NativeWarning, stacklevel=5)
        return LoadResult(False, reason, None, time.perf_counter() - start, False)
    return LoadResult(True, reason, path, time.perf_counter() - start, built)


def _attempt() -> LoadResult:
    return attempt(
        "TTA_EXT_NATIVE", lambda wanted: _load(), loss="tta_ext runs on its PyTorch reference"
    )


_once = Once(_attempt)

"""One native library: what it is made of, and its one loading in a process.

A library is prebuilt in the package, in the cache, or compiled on first use.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tta_ext.build import cache, files
from tta_ext.build.toolchain import (
    CXX_FLAGS,
    BuildError,
    CompilerError,
    Recipe,
    Torch,
    digest_of,
    find_compiler,
    find_torch,
    install_hint,
)

HEADER_SUFFIXES = (".h", ".hpp", ".inl", ".cuh")
PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LoadResult:
    """What :func:`tta_ext.build.load` found.

    Attributes:
        loaded: the library's ops are registered.
        reason: why they are not, with the command that mends it; where they came from if they are.
        path: the library, if loaded.
        seconds: time the loading took, compilation included.
        built: this call compiled it.
    """

    loaded: bool
    reason: str
    path: Path | None = None
    seconds: float = 0.0
    built: bool = False


class NotNeeded(BuildError):
    """The library would have nothing to do here, so nobody is warned that it is missing."""


class NativeWarning(RuntimeWarning):
    """The native library is not there and the slower reference serves instead."""


def source_root() -> Path:
    """The C++ tree: inside an installed package, or beside it in a checkout and an editable
    install.
    """
    shipped = PACKAGE / "_csrc"
    return shipped if shipped.is_dir() else PACKAGE.parent / "csrc"


def _open(path: Path, kind: str) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"the {kind} library {path} does not load ({error})") from error


def _one_of(variable: str, *allowed: str) -> str:
    """An environment variable's value in small letters; the first of ``allowed`` if it is not set.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get(variable, "").strip().lower() or allowed[0]
    if value not in allowed:
        raise ValueError(f"{variable}={value!r} is not one of {', '.join(allowed)}")
    return value


class Library:
    """The library of the CPU's kernels; :class:`tta_ext.build.cuda.CudaLibrary` is of CUDA's.

    Attributes:
        device, name: whose kernels it holds; its file name.
        variable: the environment variable that switches it: auto, 0 or 1.
        choices: other variables that the library reads, and their values; the first by default.
        source_globs, header_folders: what it is compiled from, below ``root``.
        flags: compiler flags for every file.
        loss: what happens without it.
        root: the C++ tree.
        result: what came of loading it; None before.
    """

    device = "CPU"
    name = "_C.so"
    variable = "TTA_EXT_NATIVE"
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"TTA_EXT_CPU_ISA": ("avx512", "avx2", "scalar")}
    )
    source_globs: tuple[str, ...] = ("cpu/*.cpp", "bind/cpu*.cpp")
    header_folders: tuple[str, ...] = ("core", "cpu", "bind")
    flags: tuple[str, ...] = CXX_FLAGS
    loss = "tta_ext runs on its PyTorch reference"

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or source_root()
        self.result: LoadResult | None = None
        self._fresh_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._fresh_lock)

    def _fresh_lock(self) -> None:
        # A fork may copy the lock while another thread holds it; nobody would release it in the
        # child.
        self._lock = threading.Lock()

    def sources(self) -> list[Path]:
        """Files to compile, sorted."""
        return sorted(path for pattern in self.source_globs for path in self.root.glob(pattern))

    def headers(self) -> list[Path]:
        """Every header that they may include, sorted."""
        return sorted(
            path
            for folder in self.header_folders
            for path in (self.root / folder).rglob("*")
            if path.suffix in HEADER_SUFFIXES
        )

    def digest(self) -> str:
        """SHA-256 of sources, headers and flags."""
        return digest_of(self.root, (*self.sources(), *self.headers()), self.flags)

    def recipe(self, torch: Torch) -> Recipe:
        """How the library is compiled here beside this torch.

        Raises:
            BuildError: a compiler is missing.
        """
        made_of = (self.name, self.root, self.sources(), self.headers(), find_compiler(), torch)
        return Recipe(*made_of, self.flags, record={"digest": self.digest()})

    def wanted(self) -> str:
        """What the environment variable says: auto (also unset), 0 or 1.

        Raises:
            ValueError: it, or one of :attr:`choices`, has another value than those.
        """
        for name, allowed in self.choices.items():
            _one_of(name, *allowed)
        return _one_of(self.variable, "auto", "0", "1")

    def require(self, torch: Torch, wanted: str) -> None:
        """``NotNeeded`` if there is nothing for the library to do."""

    def check(self, record: Mapping[str, Any], torch: Torch) -> None:
        """``BuildError`` unless a library with this record serves here."""

    def remedy(self) -> str:
        """What may mend a compiler's error."""
        return f"export CXX=<a C++17 compiler>, or {install_hint()}"

    def load(self) -> LoadResult:
        """As :func:`tta_ext.build.load`."""
        if self.result is None:
            with self._lock:
                if self.result is None:
                    self.result = self._attempt()
        return self.result

    def _attempt(self) -> LoadResult:
        wanted = self.wanted()
        if wanted == "0":
            mend = f"mend it with: unset {self.variable}"
            return LoadResult(False, f"switched off by {self.variable}=0; {mend}")
        start = time.perf_counter()
        try:
            path, built, reason = self._obtain(wanted)
        except Exception as error:  # whatever it is, the reference serves
            reason = self._summary(error)
            if wanted == "1":
                raise RuntimeError(f"{self.variable}=1, but {reason}") from error
            if not isinstance(error, NotNeeded):
                # Named after whoever called tta_ext.build.load().
                text = f"{self.loss}, which is much slower: {reason}"
                warnings.warn(text, NativeWarning, stacklevel=4)
            return LoadResult(False, reason, seconds=time.perf_counter() - start)
        return LoadResult(True, reason, path, time.perf_counter() - start, built)

    def _obtain(self, wanted: str) -> tuple[Path, bool, str]:
        """Load the library: its path, whether it was compiled now, how it was come by."""
        torch = find_torch()
        self.require(torch, wanted)
        path = PACKAGE / self.name
        try:
            record = self._prebuilt_record(path)
            self.check(record, torch)
            _open(path, "prebuilt")
            return path, False, f"prebuilt in the package{_images(record)}"
        except BuildError as error:
            why = str(error)
        if sys.platform == "win32":
            raise BuildError(
                f"{why}, and compiling on first use is not supported on Windows; use WSL"
            )
        recipe = self.recipe(torch)
        self.check(recipe.record, torch)
        path, built = cache.get(recipe, self.device.lower())
        try:
            _open(path, "compiled")
        except BuildError as error:
            # Its bytes are those that the compiler wrote: the same again would not help.
            raise BuildError(f"{error}; mend it with: {self.remedy()}") from error
        state = "compiled" if built else "found"
        return path, built, f"{state} in the cache{_images(recipe.record)}; {why}"

    def _prebuilt_record(self, path: Path) -> Mapping[str, Any]:
        """The record of the library inside the package, if that was built from these sources."""
        if not path.exists():
            raise BuildError("the package holds no prebuilt library")
        try:
            record = json.loads(path.with_suffix(".json").read_text())
        except (OSError, ValueError) as error:
            raise BuildError(f"the prebuilt library has no readable record ({error})") from error
        if record.get("digest") != self.digest():
            raise BuildError("the prebuilt library is older than the C++ sources")
        if why := files.damage(path, record):
            raise BuildError(f"the prebuilt library is damaged ({why})")
        return record

    def _summary(self, error: Exception) -> str:
        """One line for the user: the compiler's first error if it is a compiler's output."""
        text = str(error)
        if not isinstance(error, BuildError):
            said = " ".join(text.split())
            return f"getting the {self.device} library ended with {type(error).__name__}: {said}"
        lines = text.splitlines()
        if not isinstance(error, CompilerError) or len(lines) <= 1:
            return " ".join(lines)
        first = next((line.strip() for line in lines[1:] if "error:" in line), lines[-1].strip())
        return (
            f"the compiler failed: {first} (whole output in {cache.cache_dir()}/*.log); "
            f"mend it with: {self.remedy()}"
        )


def _images(record: Mapping[str, Any]) -> str:
    return f", for {' '.join(record['images'])}" if "images" in record else ""

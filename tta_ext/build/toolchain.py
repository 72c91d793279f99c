"""Compiling shared libraries: the C++ compiler, torch's files, and what a library is made of.

Standard library alone and no import of torch, so that ``setup.py`` and an installation without
torch can use it too.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: ISA variants live behind target pragmas inside the files, so every file has the same flags.
#: Contraction stays off because the numerics contract wants the same bits from every instruction
#: set.
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    # The oldest torch whose stable ABI the library may rely on: 2.10.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
MINIMUM_TORCH = (2, 10)


class BuildError(RuntimeError):
    """The library could not be compiled; the message names the command that mends it."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, its version and that of its CUDA, if it has one."""

    root: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """The torch of this environment, by its files.

    Raises:
        BuildError: it is not installed, or has no stable ABI that the libraries can use.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise BuildError(
            "torch is not installed in the build environment; mend it with: "
            "pip install --no-build-isolation ."
        )
    root = Path(spec.origin).resolve().parent
    facts = runpy.run_path(str(root / "version.py"))
    version = str(facts["__version__"])
    if tuple(map(int, version.split("+")[0].split(".")[:2])) < MINIMUM_TORCH:
        least = ".".join(map(str, MINIMUM_TORCH))
        raise BuildError(
            f"torch {version} is older than {least}, the first with the stable ABI that the "
            f"kernels use; mend it with: pip install 'torch>={least}'"
        )
    return Torch(root, version, facts.get("cuda"))


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: ``command`` as typed (``CXX`` may hold words such as ``ccache g++``) and its
    version.
    """

    command: tuple[str, ...]
    version: str


def install_hint() -> str:
    """The one command that installs a C++ compiler here."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    for tool, command in (
        ("apt-get", "apt-get install -y g++"),
        ("dnf", "dnf install -y gcc-c++"),
        ("apk", "apk add g++"),
        ("pacman", "pacman -S --noconfirm gcc"),
        ("zypper", "zypper install -y gcc-c++"),
    ):
        if shutil.which(tool):
            return command
    return "conda install -y -c conda-forge cxx-compiler"


def answer_of(command: Sequence[str], name: str, remedy: str) -> str:
    """What a program prints.

    Raises:
        BuildError: it does not run; the message calls it ``name`` and says what mends it.
    """
    try:
        return subprocess.check_output(
            command, stderr=subprocess.PIPE, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{name} does not run ({error}); mend it with: {remedy}") from error


def find_compiler() -> Compiler:
    """The C++ compiler of ``CXX``, else the first of c++, g++, clang++ on the PATH.

    Raises:
        BuildError: none was found, or it does not run; the message says what was looked for.
    """
    named = os.environ.get("CXX", "").strip()
    candidates = [tuple(shlex.split(named))] if named else [("c++",), ("g++",), ("clang++",)]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        text = answer_of(
            [*command, "--version"], f"the C++ compiler {shlex.join(command)!r}", install_hint()
        )
        return Compiler(command, text.partition("\n")[0] or shlex.join(command))
    looked, remedy = "looked for c++, g++, clang++ on the PATH", install_hint()
    if named:
        looked, remedy = f"CXX={named!r} is not on the PATH", f"unset CXX, or {remedy}"
    raise BuildError(f"no C++ compiler: {looked}; mend it with: {remedy}")


def link_flags(torch: Torch | None) -> list[str]:
    """Flags that make a shared library; unused torch libraries are dropped, undefined symbols
    refused.
    """
    flags = ["-shared"]
    if sys.platform == "darwin":
        return [*flags, "-Wl,-undefined,dynamic_lookup"]
    flags.append("-Wl,--as-needed")
    if torch is not None:
        flags += [f"-L{torch.root / 'lib'}", "-Wl,-z,defs", "-ltorch_cpu"]
    return flags


def digest_of(root: Path, files: Iterable[Path], flags: Sequence[str]) -> str:
    """SHA-256 of flags and files: contents, and names below ``root`` or their own tree's folder."""
    digest = hashlib.sha256()
    for path in files:
        inside = path.is_relative_to(root)
        name = path.relative_to(root) if inside else Path(path.parent.name, path.name)
        content = path.read_bytes()
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    digest.update("\0".join(flags).encode())
    return digest.hexdigest()


def job_count(files: int) -> int:
    """Compilers to run at once: ``MAX_JOBS`` if set, else the cores this process may use."""
    try:
        wanted = int(os.environ["MAX_JOBS"])
    except (KeyError, ValueError):
        only_linux = getattr(os, "sched_getaffinity", None)
        wanted = len(only_linux(0)) if only_linux else os.cpu_count() or 1
    return max(1, min(files, wanted))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr or done.stdout}")


@dataclass(frozen=True)
class Recipe:
    """All that a shared library is made of.

    Attributes:
        library: file name of the library.
        root: folder of the C++ tree, searched first for headers.
        sources: files to compile.
        headers: files that they may include.
        compiler: as found by :func:`find_compiler`.
        torch: whose headers and libraries are used; None builds without torch.
        flags: compiler flags for every file.
        link: flags that link; those of :func:`link_flags` if empty.
        include_dirs: searched after ``root`` and before torch's headers.
        more: what else the outcome depends on.
        record: what a file beside the library says about it.
    """

    library: str
    root: Path
    sources: Sequence[Path]
    headers: Sequence[Path]
    compiler: Compiler
    torch: Torch | None
    flags: Sequence[str] = CXX_FLAGS
    link: Sequence[str] = ()
    include_dirs: Sequence[Path] = ()
    more: Sequence[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """SHA-256 of everything the library depends on."""
        parts = (
            digest_of(self.root, (*self.sources, *self.headers), self.flags),
            *self.compiler.command,
            self.compiler.version,
            self.torch.version if self.torch else "no torch",
            sys.platform,
            platform.machine(),
            *self.more,
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def compile(self, output: Path) -> None:
        """Compile side by side and link into ``output``; objects go into its folder meanwhile.

        Raises:
            BuildError: with the failing command and what the compiler printed.
        """
        if not self.sources:
            raise BuildError(f"no C++ sources found in {self.root}; reinstall tta_ext")
        includes = [f"-I{folder}" for folder in (self.root, *self.include_dirs)]
        if self.torch is not None:
            # System headers: their warnings are not ours to mend.
            includes += ["-isystem", str(self.torch.root / "include")]
        objects = [str(output.parent / f"{i}_{path.stem}.o") for i, path in enumerate(self.sources)]
        commands = [
            [*self.compiler.command, *self.flags, *includes, "-c", str(source), "-o", made]
            for source, made in zip(self.sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(job_count(len(commands))) as pool:
            list(pool.map(_run, commands))  # the first failure cancels those that have not begun
        link = self.link or link_flags(self.torch)
        _run([*self.compiler.command, *objects, "-o", str(output), *link])
        for path in objects:
            os.unlink(path)

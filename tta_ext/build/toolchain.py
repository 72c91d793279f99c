"""How the native CPU library is compiled, in the standard library alone.

One description serves three callers, so that they cannot drift apart: ``setup.py`` (a wheel with
the library inside), :mod:`tta_ext.jit` (the first native op of an installation without one) and
the tests. Nothing here imports torch: the caller says where torch's headers and libraries lie.
:mod:`tta_ext._compile_cuda` adds what differs for the CUDA library.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Folders of ``csrc`` that reach the CPU library; ``csrc/testing`` and ``csrc/cuda`` do not.
HEADER_FOLDERS = ("core", "cpu", "bind")
HEADER_SUFFIXES = (".h", ".hpp", ".inl")
SOURCE_GLOBS = ("cpu/*.cpp", "bind/cpu*.cpp")

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
LIBRARY_NAME = "_C.so"
MINIMUM_TORCH = (2, 10)
SWITCH_VALUES = ("auto", "0", "1")


class BuildError(RuntimeError):
    """The library could not be compiled; the message names the command that mends it."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: ``command`` as typed (``CXX`` may hold words such as ``ccache g++``) and its
    version.
    """

    command: tuple[str, ...]
    version: str


def switch(name: str) -> str:
    """The environment variable ``TTA_EXT_NATIVE`` or ``TTA_EXT_CUDA``: auto (also unset), 0 or 1.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value not in SWITCH_VALUES:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(SWITCH_VALUES)}")
    return value


def source_root() -> Path:
    """The C++ tree: inside an installed package, or beside it in a checkout and an editable
    install.
    """
    package = Path(__file__).resolve().parent
    shipped = package / "_csrc"
    return shipped if shipped.is_dir() else package.parent / "csrc"


def files_of(root: Path, globs: Iterable[str]) -> list[Path]:
    """Translation units that match the patterns, sorted."""
    return sorted(path for pattern in globs for path in root.glob(pattern))


def headers_of(root: Path, folders: Iterable[str], suffixes: Sequence[str]) -> list[Path]:
    """Headers in the folders, sorted."""
    return sorted(
        path for folder in folders for path in (root / folder).rglob("*") if path.suffix in suffixes
    )


def cpu_sources(root: Path) -> list[Path]:
    """Translation units of the CPU library, sorted."""
    return files_of(root, SOURCE_GLOBS)


def cpu_headers(root: Path) -> list[Path]:
    """Every header that a translation unit of the CPU library may include, sorted."""
    return headers_of(root, HEADER_FOLDERS, HEADER_SUFFIXES)


def link_flags(torch_root: Path | None) -> list[str]:
    """Flags that make a shared library; unused torch libraries are dropped, undefined symbols
    refused.
    """
    flags = ["-shared"]
    if sys.platform == "darwin":
        return [*flags, "-Wl,-undefined,dynamic_lookup"]
    flags.append("-Wl,--as-needed")
    if torch_root is not None:
        flags += [f"-L{torch_root / 'lib'}", "-Wl,-z,defs", "-ltorch_cpu"]
    return flags


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
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{name} does not run ({error}); mend it with: {remedy}") from error
    return answer.stdout


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
    if named:
        raise BuildError(
            f"no C++ compiler: CXX={named!r} is not on the PATH; "
            f"mend it with: unset CXX, or {install_hint()}"
        )
    looked = ", ".join(command[0] for command in candidates)
    raise BuildError(
        f"no C++ compiler: looked for {looked} on the PATH; mend it with: {install_hint()}"
    )


def digest_of(root: Path, files: Iterable[Path], flags: Sequence[str]) -> str:
    """SHA-256 of files (names and contents) and flags."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    digest.update("\0".join(flags).encode())
    return digest.hexdigest()


def source_digest(root: Path, flags: Sequence[str] = CXX_FLAGS) -> str:
    """SHA-256 of the CPU library's sources, headers and flags."""
    return digest_of(root, (*cpu_sources(root), *cpu_headers(root)), flags)


def key_of(digest: str, compiler: Compiler, torch_version: str, *more: str) -> str:
    """SHA-256 that names a build: digest of the sources, compiler, torch, machine, what else."""
    parts = (
        digest,
        *compiler.command,
        compiler.version,
        torch_version,
        sys.platform,
        platform.machine(),
        *more,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def build_key(
    root: Path, compiler: Compiler, torch_version: str, flags: Sequence[str] = CXX_FLAGS
) -> str:
    """The name of a build of the CPU library."""
    return key_of(source_digest(root, flags), compiler, torch_version)


def job_count(files: int) -> int:
    """Compilers to run at once: ``MAX_JOBS`` if set, else the cores this process may use."""
    try:
        wanted = int(os.environ["MAX_JOBS"])
    except (KeyError, ValueError):
        try:
            wanted = len(os.sched_getaffinity(0))
        except AttributeError:  # not Linux
            wanted = os.cpu_count() or 1
    return max(1, min(files, wanted))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr or done.stdout}")


def compile_library(
    compiler: Compiler,
    sources: Sequence[Path],
    output: Path,
    *,
    include_dirs: Iterable[Path],
    torch_root: Path | None,
    flags: Sequence[str] = CXX_FLAGS,
    link: Sequence[str] | None = None,
) -> None:
    """Compile ``sources`` side by side and link them into ``output``; objects go into its folder.

    Args:
        compiler: as found by :func:`find_compiler`.
        sources: C++ files.
        output: the shared library to write.
        include_dirs: searched before torch's own headers.
        torch_root: folder of the torch package, for its headers and libraries; None links
            without torch.
        flags: compiler flags for every file.
        link: flags that link; those of :func:`link_flags` by default.

    Raises:
        BuildError: with the failing command and what the compiler printed.
    """
    if not sources:
        raise BuildError(f"no C++ sources found beside {Path(__file__).parent}; reinstall tta_ext")
    includes = [f"-I{folder}" for folder in include_dirs]
    if torch_root is not None:
        # System headers: their warnings are not ours to mend.
        includes += ["-isystem", str(torch_root / "include")]
    objects = [output.parent / f"{index}_{path.stem}.o" for index, path in enumerate(sources)]
    commands = [
        [*compiler.command, *flags, *includes, "-c", str(source), "-o", str(object_file)]
        for source, object_file in zip(sources, objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(job_count(len(sources))) as pool:
        running = [pool.submit(_run, command) for command in commands]
        try:
            for job in running:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
    link = link_flags(torch_root) if link is None else link
    _run([*compiler.command, *map(str, objects), "-o", str(output), *link])
    for path in objects:
        path.unlink()


def build_cpu_library(output: Path, torch_root: Path, root: Path | None = None) -> Compiler:
    """Compile the CPU library from ``root`` (default: this package's sources) into ``output``."""
    root = source_root() if root is None else root
    compiler = find_compiler()
    compile_library(compiler, cpu_sources(root), output, include_dirs=[root], torch_root=torch_root)
    return compiler

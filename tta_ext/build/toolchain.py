"""Compiling shared libraries: the C++ compiler, torch's files, and what a library is made of.

Standard library alone and no import of torch, so that ``setup.py`` and an installation without
torch can use it too.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
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
#: How long a compiler may think about who it is.
ANSWER_SECONDS = 60.0


class BuildError(RuntimeError):
    """The library could not be compiled; the message names the command that mends it."""


class CompilerError(BuildError):
    """A compiler failed: the message is its command and then, line by line, what it printed."""


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
    number = re.match(r"(\d+)\.(\d+)", version)
    # A version that is no number is somebody's own build, hardly an old one.
    if number and tuple(map(int, number.groups())) < MINIMUM_TORCH:
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


def seconds(variable: str, default: float) -> float:
    """The seconds that an environment variable names.

    Raises:
        BuildError: it is set and no number of seconds.
    """
    text = os.environ.get(variable, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1e7:
        raise BuildError(
            f"{variable}={text!r} is no number of seconds from 0 to 1e7; "
            f"mend it with: unset {variable}"
        )
    return value


# Held while a program is started: a child that is forked by another thread meanwhile would copy the
# pipes that tell us of the program's start and end, and keep them open.
_starting = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_starting.acquire,
        after_in_parent=_starting.release,
        after_in_child=_starting.release,
    )


def _end(process: subprocess.Popen[str]) -> None:
    """End a program and all that it started: a compiler is a driver of others."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _outcome(
    command: Sequence[str], limit: float, running: set[subprocess.Popen[str]] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, or for ``limit`` seconds (``TimeoutExpired``); it is in ``running``
    meanwhile.
    """
    with _starting:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Not the locale's, which need not be that of the program's messages.
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    with started as process:
        running = set() if running is None else running
        running.add(process)
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException:
            _end(process)
            raise
        finally:
            running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def answer_of(command: Sequence[str], name: str, remedy: str) -> str:
    """What a program prints.

    Raises:
        BuildError: it does not run; the message calls it ``name`` and says what mends it.
    """
    try:
        done = _outcome(command, ANSWER_SECONDS)
        done.check_returncode()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{name} does not run ({error}); mend it with: {remedy}") from error
    return done.stdout


def find_compiler() -> Compiler:
    """The C++ compiler of ``CXX``, else the first of c++, g++, clang++ on the PATH.

    Raises:
        BuildError: none was found, or it does not run; the message says what was looked for.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        candidates = [tuple(shlex.split(named))] if named else [("c++",), ("g++",), ("clang++",)]
    except ValueError as error:
        raise BuildError(
            f"no C++ compiler: CXX={named!r} cannot be read ({error}); mend it with: "
            f"unset CXX, or {install_hint()}"
        ) from error
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
    """Compilers to run at once: ``MAX_JOBS`` if set, else the cores this process may use.

    Raises:
        BuildError: ``MAX_JOBS`` is no positive number.
    """
    if text := os.environ.get("MAX_JOBS", "").strip():
        if not text.isdecimal() or int(text) < 1:
            raise BuildError(
                f"MAX_JOBS={text!r} is no number from 1 on; mend it with: unset MAX_JOBS"
            )
        wanted = int(text)
    else:
        only_linux = getattr(os, "sched_getaffinity", None)
        wanted = len(only_linux(0)) if only_linux else os.cpu_count() or 1
    return max(1, min(files, wanted))


def _run(running: set[subprocess.Popen[str]], command: Sequence[str], output: Path) -> None:
    """Run a compiler that is to write ``output``; ``CompilerError`` unless it does."""
    limit = seconds("TTA_EXT_COMPILE_TIMEOUT", 3600.0)
    try:
        done = _outcome(command, limit, running)
    except subprocess.TimeoutExpired:
        raise CompilerError(
            f"{shlex.join(command)}\nerror: no end after {limit:g} s; raise "
            "TTA_EXT_COMPILE_TIMEOUT where that is too short"
        ) from None
    except OSError as error:
        raise CompilerError(f"{shlex.join(command)}\nerror: does not run ({error})") from error
    if done.returncode or not output.is_file():
        printed = done.stderr or done.stdout or f"error: ended with {done.returncode}"
        said = printed if done.returncode else f"error: wrote no {output.name}\n{printed}"
        raise CompilerError(f"{shlex.join(command)}\n{said}")


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
        objects = [output.parent / f"{i}_{path.stem}.o" for i, path in enumerate(self.sources)]
        commands = [
            [*self.compiler.command, *self.flags, *includes, "-c", str(source), "-o", str(made)]
            for source, made in zip(self.sources, objects, strict=True)
        ]
        running: set[subprocess.Popen[str]] = set()
        with concurrent.futures.ThreadPoolExecutor(job_count(len(commands))) as pool:
            try:
                list(pool.map(functools.partial(_run, running), commands, objects))
            except BaseException:  # also ^C: what has not begun is cancelled, the rest ended
                for process in list(running):
                    _end(process)
                raise
        link = self.link or link_flags(self.torch)
        command = [*self.compiler.command, *map(str, objects), "-o", str(output), *link]
        _run(running, command, output)
        for path in objects:
            path.unlink()

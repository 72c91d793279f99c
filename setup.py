"""Builds the wheel; the metadata is in pyproject.toml.

The C++ sources always ship inside the package (as ``tta_ext._csrc``), to be compiled by the first
op that needs them. Where torch is installed while building (``--no-build-isolation``) they are
compiled now and the wheel carries the libraries. ``TTA_EXT_NATIVE`` for the CPU's, ``TTA_EXT_CUDA``
for CUDA's = auto (default: prebuild if torch and a compiler are here, for CUDA a torch with CUDA
and an nvcc of its major version; else one sentence says what is missing), 0 (never), 1 (prebuild or
fail). The CUDA library is for ``TORCH_CUDA_ARCH_LIST``, else for the GPUs of this machine, else for
all architectures.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"


def load_compile() -> tuple[ModuleType, ModuleType]:
    """``tta_ext._compile`` and ``_compile_cuda`` without ``tta_ext`` itself, which needs torch."""
    package = ModuleType("tta_ext")
    package.__path__ = [str(HERE / "tta_ext")]
    sys.modules["tta_ext"] = package
    try:
        cuda = importlib.import_module("tta_ext._compile_cuda")
        return sys.modules["tta_ext._compile"], cuda
    finally:
        del sys.modules["tta_ext"]


def torch_root() -> Path | None:
    """Folder of the torch package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def switch(name: str) -> str:
    """The environment variable: auto, 0 or 1."""
    try:
        return _compile.switch(name)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def needed_torch() -> Path:
    """Folder of the torch package, or ``BuildError``."""
    root = torch_root()
    if root is None:
        raise _compile.BuildError(
            "torch is not installed in the build environment; mend it with: "
            "pip install --no-build-isolation ."
        )
    return root


def probe_cpu() -> None:
    """``BuildError`` unless the CPU library can be compiled here."""
    needed_torch()
    _compile.find_compiler()


def compile_cpu(output: Path) -> dict[str, object]:
    """The CPU library; what its record shall say."""
    compiler = _compile.build_cpu_library(output, needed_torch(), CSRC)
    return {"digest": _compile.source_digest(CSRC), "compiler": compiler.version}


def probe_cuda() -> None:
    """``BuildError`` unless the CUDA library can be compiled here."""
    _compile_cuda.plan(needed_torch())


def compile_cuda(output: Path) -> dict[str, object]:
    """The CUDA library; what its record shall say."""
    root = needed_torch()
    return _compile_cuda.build_library(_compile_cuda.plan(root), output, root, CSRC)


@dataclass(frozen=True)
class Library:
    """A library that a wheel may carry: its device, its switch, and how it is compiled."""

    device: str
    variable: str
    probe: Callable[[], None]
    compile: Callable[[Path], dict[str, object]]


LIBRARIES = {
    "_C": Library("CPU", "TTA_EXT_NATIVE", probe_cpu, compile_cpu),
    "_C_cuda": Library("CUDA", "TTA_EXT_CUDA", probe_cuda, compile_cuda),
}


def leave_out(devices: list[str], reason: str) -> None:
    """Say that the libraries are compiled when they are first used."""
    print(
        f"tta_ext: the first op compiles the {' and the '.join(devices)} library: {reason}",
        file=sys.stderr,
    )


def extensions() -> list[Extension]:
    """The libraries that this build compiles."""
    chosen = []
    reasons: dict[str, list[str]] = {}
    for name, library in LIBRARIES.items():
        wanted = switch(library.variable)
        if wanted == "0":
            continue
        try:
            library.probe()
        except _compile.BuildError as error:
            if wanted == "1":
                raise SystemExit(f"{library.variable}=1, but {error}") from None
            reasons.setdefault(str(error), []).append(library.device)
        else:
            chosen.append(Extension(f"tta_ext.{name}", sources=[], optional=wanted == "auto"))
    for reason, devices in reasons.items():
        leave_out(devices, reason)
    return chosen


class BuildNative(build_ext):
    """Compiles the libraries with the same functions as the on-the-fly builder."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python symbol is in a library, so its name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        libraries = [path for path in super().get_outputs() if Path(path).exists()]
        return [*libraries, *(str(Path(path).with_suffix(".json")) for path in libraries)]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        built = folder / output.name
        library = LIBRARIES[output.stem]
        try:
            record = library.compile(built)
        except _compile.BuildError as error:
            if not ext.optional:
                raise SystemExit(f"tta_ext: {output.name} does not compile:\n{error}") from None
            leave_out([library.device], f"it does not compile now:\n{error}")
            return
        # A running process may have the old library mapped: replace the file, never write into it.
        output.unlink(missing_ok=True)
        self.move_file(str(built), str(output))
        output.with_suffix(".json").write_text(json.dumps(record))


class AnyPythonWheel(bdist_wheel):
    """The library links torch's stable ABI only: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


_compile, _compile_cuda = load_compile()

_NAMES = sorted({*_compile.HEADER_FOLDERS, *_compile_cuda.HEADER_FOLDERS})
_FOLDERS = ["", *(f".{name}" for name in _NAMES if (CSRC / name).is_dir())]
_PATTERNS = [
    *(f"*{suffix}" for suffix in _compile_cuda.HEADER_SUFFIXES),
    *("*.cpp", "*.cu"),
]

setup(
    packages=[
        *find_packages(include=["tta_ext", "tta_ext.*"]),
        "tta_ext._benchmarks",
        *(f"tta_ext._csrc{folder}" for folder in _FOLDERS),
    ],
    # Trees that stand at the top of the checkout and inside the installed package.
    package_dir={"tta_ext._csrc": "csrc", "tta_ext._benchmarks": "benchmarks"},
    # MANIFEST.in is for the source distribution; the wheel has no tests and no results.
    include_package_data=False,
    package_data={
        "tta_ext": ["py.typed", "assets/**/*"],
        **{f"tta_ext._csrc{folder}": _PATTERNS for folder in _FOLDERS},
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)

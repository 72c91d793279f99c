"""Builds the wheel; the metadata is in pyproject.toml.

The C++ sources always ship inside the package (as ``tta_ext._csrc``), to be compiled by the first
native op. Where torch can be imported while building (``--no-build-isolation``) the CPU library is
compiled now and the wheel carries it. ``TTA_EXT_NATIVE`` = auto (default: prebuild if torch and a
compiler are here), 0 (never), 1 (prebuild or fail). ``TTA_EXT_CUDA=1`` prebuilds the CUDA library
too, for ``TORCH_CUDA_ARCH_LIST`` or for all architectures; otherwise that is left to the first op
on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
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


def prebuild_cuda() -> bool:
    """Whether this build compiles the CUDA library."""
    if switch("TTA_EXT_CUDA") != "1":
        return False
    try:
        _compile_cuda.toolkit_for(*_compile_cuda.torch_cuda(needed_torch()))
    except _compile.BuildError as error:
        raise SystemExit(f"TTA_EXT_CUDA=1, but {error}") from None
    return True


def prebuild() -> bool:
    """Whether this build compiles the CPU library."""
    wanted = switch("TTA_EXT_NATIVE")
    if wanted == "0":
        return False
    try:
        needed_torch()
        _compile.find_compiler()
    except _compile.BuildError as error:
        if wanted == "1":
            raise SystemExit(f"TTA_EXT_NATIVE=1, but {error}") from None
        print(f"tta_ext: the CPU library is left to the first native op: {error}", file=sys.stderr)
        return False
    return True


class BuildNative(build_ext):
    """Compiles the libraries with the same functions as the on-the-fly builder."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python symbol is in a library, so its name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        library = super().get_outputs()
        return [*library, *(str(Path(path).with_suffix(".json")) for path in library)]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        built = folder / output.name
        try:
            if output.name == _compile_cuda.LIBRARY_NAME:
                record = _compile_cuda.build_library(built, needed_torch(), CSRC)
            else:
                compiler = _compile.build_cpu_library(built, needed_torch(), CSRC)
                record = {"digest": _compile.source_digest(CSRC), "compiler": compiler.version}
        except _compile.BuildError as error:
            raise SystemExit(f"tta_ext: {output.name} does not compile:\n{error}") from None
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
_LIBRARIES = [name for name, wanted in (("_C", prebuild), ("_C_cuda", prebuild_cuda)) if wanted()]

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
    ext_modules=[Extension(f"tta_ext.{name}", sources=[]) for name in _LIBRARIES],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)

"""Builds the wheel; the metadata is in pyproject.toml.

The C++ sources always ship inside the package (as ``tta_ext._csrc``), to be compiled by the first
native op. Where torch can be imported while building (``--no-build-isolation``) the CPU library is
compiled now and the wheel carries it. ``TTA_EXT_NATIVE`` = auto (default: prebuild if torch and a
compiler are here), 0 (never), 1 (prebuild or fail).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"


def load_compile() -> ModuleType:
    """``tta_ext._compile`` by its path: importing the package would need torch."""
    name = "tta_ext_compile"
    spec = importlib.util.spec_from_file_location(name, HERE / "tta_ext" / "_compile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def torch_root() -> Path | None:
    """Folder of the torch package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def prebuild() -> bool:
    """Whether this build compiles the CPU library."""
    wanted = os.environ.get("TTA_EXT_NATIVE", "").strip().lower() or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"TTA_EXT_NATIVE={wanted!r} is not one of auto, 0, 1")
    if wanted == "0":
        return False
    try:
        if torch_root() is None:
            raise _compile.BuildError(
                "torch is not installed in the build environment; mend it with: "
                "pip install --no-build-isolation ."
            )
        _compile.find_compiler()
    except _compile.BuildError as error:
        if wanted == "1":
            raise SystemExit(f"TTA_EXT_NATIVE=1, but {error}") from None
        print(f"tta_ext: the CPU library is left to the first native op: {error}", file=sys.stderr)
        return False
    return True


class BuildNative(build_ext):
    """Compiles the one extension with the same function as the on-the-fly builder."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python symbol is in the library, so its name carries no Python version.
        return str(Path(*fullname.split(".")[:-1]) / _compile.LIBRARY_NAME)

    def get_outputs(self) -> list[str]:
        library = super().get_outputs()
        return [*library, *(str(Path(path).with_suffix(".json")) for path in library)]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        root = torch_root()
        assert root is not None
        built = folder / output.name
        try:
            compiler = _compile.build_cpu_library(built, root, CSRC)
        except _compile.BuildError as error:
            raise SystemExit(f"tta_ext: the CPU library does not compile:\n{error}") from None
        # A running process may have the old library mapped: replace the file, never write into it.
        output.unlink(missing_ok=True)
        self.move_file(str(built), str(output))
        record = {"digest": _compile.source_digest(CSRC), "compiler": compiler.version}
        output.with_suffix(".json").write_text(json.dumps(record))


class AnyPythonWheel(bdist_wheel):
    """The library links torch's stable ABI only: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


_compile = load_compile()

_FOLDERS = ["", *(f".{name}" for name in _compile.HEADER_FOLDERS)]

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
        **{f"tta_ext._csrc{folder}": ["*.h", "*.hpp", "*.inl", "*.cpp"] for folder in _FOLDERS},
    },
    ext_modules=[Extension("tta_ext._C", sources=[])] if prebuild() else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)

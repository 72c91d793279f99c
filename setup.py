"""Builds the wheel; the metadata is in pyproject.toml.

The C++ sources always ship inside the package (as ``tta_ext._csrc``), to be compiled by the first
op that needs them. Where torch is installed while building (``--no-build-isolation``) they are
compiled now and the wheel carries the libraries, as :mod:`tta_ext.build` describes them.
``TTA_EXT_NATIVE`` for the CPU's, ``TTA_EXT_CUDA`` for CUDA's = auto (default: prebuild if torch and
the compilers are here, else one sentence says what is missing), 0 (never), 1 (prebuild or fail).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent

# tta_ext.build without tta_ext itself, which needs torch.
sys.modules["tta_ext"] = ModuleType("tta_ext")
sys.modules["tta_ext"].__path__ = [str(HERE / "tta_ext")]
from tta_ext.build import LIBRARIES, files  # noqa: E402
from tta_ext.build.toolchain import BuildError, Recipe, find_torch  # noqa: E402

del sys.modules["tta_ext"]


def leave_out(devices: Iterable[str], reason: str) -> None:
    """Say that the libraries are compiled when they are first used."""
    print(
        f"tta_ext: the first op compiles the {' and the '.join(devices)} library: {reason}",
        file=sys.stderr,
    )


class Native(Extension):
    """A library that this build compiles, and how."""

    def __init__(self, device: str, recipe: Recipe, optional: bool) -> None:
        super().__init__(f"tta_ext.{Path(recipe.library).stem}", sources=[], optional=optional)
        self.device, self.recipe = device, recipe


def extensions() -> list[Native]:
    """The libraries that this build compiles."""
    chosen = []
    reasons: dict[str, list[str]] = {}
    for library in LIBRARIES.values():
        try:
            wanted = library.wanted()
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if wanted == "0":
            continue
        try:
            recipe = library.recipe(find_torch())
        except BuildError as error:
            if wanted == "1":
                raise SystemExit(f"{library.variable}=1, but {error}") from None
            reasons.setdefault(str(error), []).append(library.device)
        else:
            chosen.append(Native(library.device, recipe, optional=wanted == "auto"))
    for reason, devices in reasons.items():
        leave_out(devices, reason)
    return chosen


class BuildNative(build_ext):
    """Compiles the libraries by the recipes of the on-the-fly builder."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python symbol is in a library, so its name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        libraries = [path for path in super().get_outputs() if Path(path).exists()]
        return [*libraries, *(str(Path(path).with_suffix(".json")) for path in libraries)]

    def build_extension(self, ext: Native) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        built = Path(self.build_temp).resolve() / output.name
        for path in (output, built):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            ext.recipe.compile(built)
        except BuildError as error:
            if not ext.optional:
                raise SystemExit(f"tta_ext: {output.name} does not compile:\n{error}") from None
            leave_out([ext.device], f"it does not compile now:\n{error}")
            return
        # A running process may have the old library mapped: replace the file, never write into it.
        output.unlink(missing_ok=True)
        self.move_file(str(built), str(output))
        record = {
            "compiler": ext.recipe.compiler.version,
            **ext.recipe.record,
            **files.stamp(output.read_bytes()),
        }
        output.with_suffix(".json").write_text(json.dumps(record))


class AnyPythonWheel(bdist_wheel):
    """The library links torch's stable ABI only: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


_FILES = [
    path for library in LIBRARIES.values() for path in (*library.sources(), *library.headers())
]
_PACKAGES = ["tta_ext._csrc", *sorted({f"tta_ext._csrc.{path.parent.name}" for path in _FILES})]

setup(
    packages=[
        *find_packages(include=["tta_ext", "tta_ext.*"]),
        "tta_ext._benchmarks",
        *_PACKAGES,
    ],
    # Trees that stand at the top of the checkout and inside the installed package.
    package_dir={"tta_ext._csrc": "csrc", "tta_ext._benchmarks": "benchmarks"},
    # MANIFEST.in is for the source distribution; the wheel has no tests and no results.
    include_package_data=False,
    package_data={
        "tta_ext": ["py.typed", "assets/**/*"],
        "tta_ext.pages": ["templates/*.j2"],
        **{package: sorted({f"*{path.suffix}" for path in _FILES}) for package in _PACKAGES},
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)

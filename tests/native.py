"""Builds the dev-only Python module that shows csrc/core and the kernels to pytest."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from tta_ext.build import LIBRARIES, cache
from tta_ext.build.toolchain import CXX_FLAGS, Recipe, find_compiler

NAME = "tta_ext_testing"


@functools.cache
def testing_module() -> ModuleType:
    """``csrc/testing/pybind.cpp``, compiled once into the build cache.

    It includes csrc/core and the row kernels; of the other kernel files it needs ``isa.cpp`` alone.

    The module's name in ``PYBIND11_MODULE`` is ``tta_ext_testing``. Raises ``BuildError`` where
    there is no compiler.
    """
    import pybind11

    cpu = LIBRARIES["cpu"]
    testing = cpu.root / "testing"
    recipe = Recipe(
        f"{NAME}.so",
        cpu.root,
        [cpu.root / "cpu" / "isa.cpp", testing / "pybind.cpp"],
        [*cpu.headers(), *sorted(testing.glob("*.h"))],
        find_compiler(),
        torch=None,
        flags=(*CXX_FLAGS, "-O1"),  # the product's own are for the C++ tests
        include_dirs=[Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])],
        more=(pybind11.__version__, sys.version),
    )
    path, _ = cache.get(recipe, "testing")
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module

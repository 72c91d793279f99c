"""Builds the dev-only Python module that shows csrc/core and the kernels to pytest."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from tta_ext import _compile, jit

NAME = "tta_ext_testing"


@functools.cache
def testing_module() -> ModuleType:
    """``csrc/testing/pybind.cpp``, compiled once into the build cache.

    It includes csrc/core and the row kernels; of the other kernel files it needs ``isa.cpp`` alone.

    The module's name in ``PYBIND11_MODULE`` is ``tta_ext_testing``. Raises ``BuildError`` where
    there is no compiler.
    """
    import pybind11

    root = _compile.source_root()
    binding = root / "testing" / "pybind.cpp"
    compiler = _compile.find_compiler()
    headers = [path for path in (root / "testing").iterdir() if path.suffix == ".h"]
    key = hashlib.sha256(
        b"\0".join(
            [
                _compile.build_key(root, compiler, "no torch").encode(),
                *(path.read_bytes() for path in (binding, *sorted(headers))),
                pybind11.__version__.encode(),
                sys.version.encode(),
            ]
        )
    ).hexdigest()
    path, _ = jit.build(
        [root / "cpu" / "isa.cpp", binding],
        key,
        compiler=compiler,
        include_dirs=[root, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])],
        torch_root=None,
        stem="testing",
        library=f"{NAME}.so",
    )
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module

"""The CUDA kernels without a GPU: compiled by g++ against csrc/testing/simt.

Three builds of the same sources, each compiled once into the build cache:

* ``plain``: as fast as scalar C++; finds wrong results, divergent barriers, deadlocks.
* ``hooks``: every memory access of a kernel is checked (bounds, races, uninitialised shared
  memory), and threads can be preempted at any of them.
* ``asan``: AddressSanitizer and UBSan. Loads only into a process that was started with
  :func:`asan_environment`.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tta_ext.build.toolchain import Recipe, Torch

MODES = ("plain", "hooks", "asan")

# A build has one list of flags for all files; this compiler adds those of kernels (.cu, which are
# C++ to g++ and look for headers in their own tree first), of the layer, of the binding to torch
# and of the link.
_SCRIPT = """
kind=layer
for argument; do
case $argument in
*.cu) kind=kernel tree=${{argument%/cuda/*}};;
*module.cpp) kind=binding;;
-shared) kind=link;;
esac
done
case $kind in
kernel) exec {compiler} {kernel} -I"$tree" "$@";;
binding) exec {compiler} {binding} "$@";;
link) exec {compiler} "$@" {sanitize};;
layer) exec {compiler} {layer} "$@";;
esac
"""
# No fast path of the host may change a bit: no contraction.
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-DTTA_SIMT",
)
_SANITIZE = "-fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# -fno-tree-sra keeps a vector load one access, so that its alignment can be checked.
_KERNEL_FLAGS = {
    "plain": "-x c++",
    "hooks": "-x c++ -DTTA_SIMT_HOOKS -fsanitize=thread -fno-tree-sra",
    "asan": f"-x c++ {_SANITIZE}",
}
_LAYER_FLAGS = {"plain": "-O2", "hooks": "-O2 -DTTA_SIMT_HOOKS", "asan": _SANITIZE}

_STATISTICS = (
    "launches",
    "blocks",
    "switches",
    "accesses",
    "barriers",
    "warp_operations",
    "shared_bytes",
    "max_threads",
)


def missing() -> str:
    """Why the SIMT layer cannot be built here, or ""."""
    from tta_ext.build import toolchain

    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the SIMT layer is for x86-64 Linux, not {platform.machine()} {sys.platform}"
    try:
        compiler = toolchain.find_compiler()
    except toolchain.BuildError as error:
        return f"no C++ compiler: {error}"
    if "clang" in compiler.version:
        return f"the SIMT layer needs g++, not {compiler.version}"
    return ""


def _fused_multiply_add() -> tuple[str, ...]:
    """With the instruction std::fma is one operation, without it a call; the result is the same."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    return ("-mfma",) if " fma " in flags else ()


def _recipe(mode: str, root: Path, binding: Sequence[str], **options: Any) -> Recipe:
    from tta_ext.build import toolchain

    plain = toolchain.find_compiler()
    script = _SCRIPT.format(
        compiler=shlex.join(plain.command),
        kernel=_KERNEL_FLAGS[mode],
        layer=_LAYER_FLAGS[mode],
        binding=shlex.join(binding),
        sanitize=_SANITIZE if mode == "asan" else "",
    )
    return toolchain.Recipe(
        root=root,
        compiler=toolchain.Compiler(("sh", "-c", script, "g++"), plain.version),
        flags=(*_FLAGS, *_fused_multiply_add()),
        include_dirs=[root / "testing" / "simt"],
        **options,
    )


def _build(
    stem: str,
    mode: str,
    root: Path,
    kernels: Mapping[Path, Sequence[Path]],
    sources: Sequence[Path],
    headers: Sequence[Path],
    torch: Torch | None,
    namespace: str,
) -> Path:
    """A library of kernels, of which each has headers of its own, and the layer.

    The kernels are objects of their own in the cache: builds that differ in one share the others.
    """
    from tta_ext.build import cache, toolchain

    def compiled(kernel: Path) -> str:
        recipe = _recipe(
            mode,
            root,
            (),
            library=f"{kernel.stem}.o",
            sources=[kernel],
            headers=[*headers, *kernels[kernel]],
            torch=None,
            link=["-r", "-nostdlib"],
        )
        return str(cache.get(recipe, f"{stem}-{kernel.stem}-{mode}")[0])

    with concurrent.futures.ThreadPoolExecutor(toolchain.job_count(len(kernels))) as pool:
        objects = list(pool.map(compiled, kernels))
    torch_flags = [flag for flag in toolchain.CXX_FLAGS if flag.startswith("-DTORCH_")]
    recipe = _recipe(
        mode,
        root,
        ["-O0", "-g0", f"-DTTA_SIMT_LIBRARY={namespace}", *torch_flags],
        library=f"{stem}.so",
        sources=sources,
        headers=headers,
        torch=torch,
        link=[*objects, *toolchain.link_flags(torch)],
        more=objects,
    )
    return cache.get(recipe, f"{stem}-{mode}")[0]


def _files(root: Path, *folders: str, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        path for folder in folders for path in (root / folder).iterdir() if path.suffix in suffixes
    )


def _layer(root: Path, *names: str) -> list[Path]:
    folder = root / "testing" / "simt"
    return [folder / name for name in (*names, "control.cpp", "runtime.cpp", "shadow.cpp")]


class Layer:
    """One build of the layer, loaded: csrc/testing/simt/control.h."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.simt_error.restype = ctypes.c_char_p

    def has_hooks(self) -> bool:
        return bool(self.library.simt_has_hooks())

    def configure(
        self,
        *,
        seed: int = 0,
        preempt: float = 0.0,
        bounds: bool = True,
        races: bool = True,
        uninitialised: bool = True,
        step_limit: int = 200_000_000,
        forget: str = "",
        forget_in: str = "",
        forget_at: int = 0,
    ) -> None:
        """Options of the launches that follow (csrc/testing/simt/control.h); those left out get
        their defaults.
        """
        self.library.simt_configure(
            ctypes.c_uint64(seed),
            ctypes.c_double(preempt),
            bounds,
            races,
            uninitialised,
            ctypes.c_uint64(step_limit),
            forget.encode(),
            forget_in.encode(),
            forget_at,
        )

    def add_buffer(self, address: int, size: int, writable: bool, name: str) -> None:
        """Memory that kernels may touch, exact to the byte."""
        self.library.simt_add_buffer(
            ctypes.c_void_p(address), ctypes.c_size_t(size), writable, name.encode()
        )

    def clear_buffers(self) -> None:
        self.library.simt_clear_buffers()

    def raise_error(self) -> None:
        """RuntimeError with the first report since the last call, if there is one."""
        error = self.library.simt_error().decode()
        self.library.simt_clear_error()
        if error:
            raise RuntimeError(error)

    def statistics(self) -> dict[str, int]:
        """What the launches since the last call did."""
        values = (ctypes.c_uint64 * len(_STATISTICS))()
        self.library.simt_statistics(values)
        return dict(zip(_STATISTICS, values, strict=True))


class Selftest(Layer):
    """The layer's own test kernels: csrc/testing/simt/selftest.cu."""

    def names(self) -> list[str]:
        self.library.simt_selftest_names.restype = ctypes.c_char_p
        return self.library.simt_selftest_names().decode().split()

    def run(
        self, name: str, x: np.ndarray, output: np.ndarray, words: np.ndarray, bug: int
    ) -> None:
        """Run a kernel on float32 ``x`` (read-only) and ``output`` and uint32 ``words``.

        Raises:
            RuntimeError: the report of the first fault.
        """
        for array, label in ((x, "input"), (output, "output"), (words, "words")):
            self.add_buffer(array.ctypes.data, array.nbytes, label != "input", label)
        self.library.simt_selftest_run(
            name.encode(),
            ctypes.c_void_p(x.ctypes.data),
            ctypes.c_int64(x.size),
            ctypes.c_void_p(output.ctypes.data),
            ctypes.c_void_p(words.ctypes.data),
            bug,
        )
        self.clear_buffers()
        self.raise_error()


def build_selftest(mode: str) -> Path:
    """The library of the layer's own test kernels, compiled if the cache lacks it.

    Raises:
        BuildError: compilation failed.
    """
    from tta_ext.build.library import source_root

    root = source_root()
    headers = _files(root, "testing/simt", suffixes=(".h",))
    kernels: dict[Path, list[Path]] = {root / "testing" / "simt" / "selftest.cu": []}
    return _build("simt_selftest", mode, root, kernels, _layer(root), headers, None, "")


@functools.cache
def selftest(mode: str) -> Selftest:
    """The layer's own test kernels; ``asan`` needs the environment of :func:`asan_environment`."""
    return Selftest(build_selftest(mode))


def _segments(x: Tensor) -> list[tuple[int, int]]:
    """Address and size of the contiguous runs of a tensor, so that gaps are out of bounds."""
    if not x.numel():
        return []
    if x.is_contiguous():
        return [(x.data_ptr(), x.numel() * x.element_size())]
    return [segment for part in x.unbind(0) for segment in _segments(part)]


class Kernels(Layer):
    """The operators of tta_ext, run by the CUDA kernels on CPU tensors."""

    def __init__(self, namespace: str, path: Path) -> None:
        import torch

        from tta_ext import schemas

        self.definitions = torch.library.Library(namespace, "DEF")
        for spec in schemas.OPS.values():
            self.definitions.define(spec.out_schema)
        torch.ops.load_library(str(path))
        self.ops = getattr(torch.ops, namespace)
        super().__init__(path)

    def __call__(self, name: str, *args: Any) -> tuple[Tensor, ...]:
        """``torch.ops.tta_ext.NAME(*args)`` by the CUDA kernel: the outputs, always as a tuple.

        A tensor without dimensions is a number that the host knows, any other lies in device
        memory. Outputs are full of 0xcd before the call unless the operator adds to them.

        Raises:
            RuntimeError: what the operator raises, or "SIMT: " and the report of a fault.
        """
        import torch

        from tta_ext import schemas

        spec = schemas.OPS[name]
        outputs = dict(zip(spec.outputs, spec.allocate(*args), strict=True))
        for label, x in outputs.items():
            if label not in spec.accumulated and x.numel():
                x.view(-1).view(torch.uint8).fill_(0xCD)
        names = [argument.split()[1] for argument in spec.arguments.split(", ")]
        known: set[tuple[int, int]] = set()
        for label, x in (*zip(names, args, strict=True), *outputs.items()):
            if not isinstance(x, torch.Tensor):
                continue
            for segment in _segments(x):
                if segment not in known:  # one tensor may be two arguments
                    self.add_buffer(*segment, label in outputs and x is outputs[label], label)
                    known.add(segment)
        try:
            getattr(self.ops, name).out(*args, **outputs)
        finally:
            self.clear_buffers()
            self.library.simt_clear_error()
        return tuple(outputs.values())


def build_kernels(mode: str, namespace: str, changed: Mapping[str, Path] | None = None) -> Path:
    """The library of csrc/cuda, compiled if the cache lacks it.

    Args:
        mode: one of ``MODES``.
        namespace: of its torch operators.
        changed: for names such as ``verify.cu`` the tree whose ``cuda`` folder has the file and
            those headers that it alone shall see.

    Raises:
        BuildError: compilation failed.
    """
    from tta_ext.build.library import source_root
    from tta_ext.build.toolchain import find_torch

    root, trees, kernels = source_root(), changed or {}, {}
    for path in _files(root, "cuda", suffixes=(".cu",)):
        tree = trees.get(path.name)
        if tree is None:
            kernels[path] = []
        else:
            kernels[tree / "cuda" / path.name] = _files(tree, "cuda", suffixes=(".cuh",))
    headers = _files(root, "bind", "core", "cuda", "testing/simt", suffixes=(".h", ".cuh"))
    layer = _layer(root, "module.cpp")
    return _build("simt", mode, root, kernels, layer, headers, find_torch(), namespace)


@functools.cache
def kernels(mode: str) -> Kernels:
    """The kernels of csrc/cuda; ``asan`` as in :func:`selftest`."""
    namespace = f"tta_ext_simt_{mode}"
    return Kernels(namespace, build_kernels(mode, namespace))


def changed_kernels(namespace: str, changed: Mapping[str, Path], mode: str = "hooks") -> Kernels:
    """A build with files of other trees, as in :func:`build_kernels`."""
    return Kernels(namespace, build_kernels(mode, namespace, changed))


def asan_environment() -> dict[str, str] | None:
    """Environment variables for a Python that can load ``asan`` builds; None where g++ has no
    sanitizers.
    """
    from tta_ext.build import toolchain

    compiler = toolchain.find_compiler()
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [*compiler.command, f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if not Path(found).is_absolute():
            return None
        libraries.append(str(Path(found).resolve()))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

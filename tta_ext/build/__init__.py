"""The native libraries: compiled by ``setup.py`` into a wheel, or by the first op that needs them.

Nothing happens at import, and nothing here imports torch before :func:`load`. The ops layer calls
:func:`load` before its first native op on a device.

Environment: ``TTA_EXT_NATIVE`` for the CPU's library = auto (default), 0 (never load), 1 (fail
loudly); ``TTA_EXT_CUDA`` for CUDA's = auto (default: if torch has CUDA, a GPU is visible and the
wheel carries the library or nvcc is there), 0, 1 (compiles also where no GPU is visible);
``TTA_EXT_CACHE_DIR``; ``TTA_EXT_LOCK_TIMEOUT``, ``TTA_EXT_COMPILE_TIMEOUT`` (seconds, by default
600 and 3600); ``TTA_EXT_CPU_ISA`` = avx512, avx2, scalar; ``CXX``; ``MAX_JOBS``;
``TORCH_CUDA_ARCH_LIST``; ``CUDA_HOME``, ``CUDA_PATH``.
"""

from __future__ import annotations

from tta_ext.build.cuda import CudaLibrary
from tta_ext.build.library import Library, LoadResult, NativeWarning
from tta_ext.build.toolchain import BuildError

__all__ = ["LIBRARIES", "BuildError", "Library", "LoadResult", "NativeWarning", "load"]

LIBRARIES: dict[str, Library] = {"cpu": Library(), "cuda": CudaLibrary()}


def load(device: str) -> LoadResult:
    """Load a native library once per process: prebuilt, cached, or compiled now (CUDA: minutes).

    Safe to call from many threads and processes at once; later calls return the first call's
    result.

    Args:
        device: "cpu" or "cuda".

    Returns:
        LoadResult; ``loaded`` is False where there is no compiler or the library is switched off,
        for CUDA also where torch has no CUDA, no GPU is visible, nvcc is of another CUDA than
        torch, or the library's architectures do not serve the GPU. Where something is slower for
        it that warns once (:class:`NativeWarning`).

    Raises:
        RuntimeError: the library is demanded (``TTA_EXT_NATIVE=1``, ``TTA_EXT_CUDA=1``) and cannot
            be had.
        ValueError: the variable has another value than auto, 0, 1, or ``TTA_EXT_CPU_ISA`` is none.
    """
    return LIBRARIES[device].load()

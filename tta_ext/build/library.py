"""Loading the CUDA library: prebuilt in the package, cached, or compiled on first use.

The first operator on CUDA tensors calls :func:`load`. Environment: ``TTA_EXT_CUDA`` = auto
(default: if torch has CUDA, a GPU is visible and the wheel carries the library or nvcc is there),
0 (never), 1 (fail loudly; compiles also where no GPU is visible); ``TORCH_CUDA_ARCH_LIST``;
``CUDA_HOME``, ``CUDA_PATH``; the rest as in :mod:`tta_ext.jit`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tta_ext import _compile, _compile_cuda, jit
from tta_ext._compile import BuildError
from tta_ext.jit import LoadResult, Once


def gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of every visible GPU; empty without one."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]


def check_images(
    images: Sequence[str], gpus: Sequence[tuple[str, tuple[int, int]]], where: str
) -> None:
    """``BuildError`` if a GPU can run nothing of the library.

    Args:
        images: such as ``sm_90`` or ``compute_90``.
        gpus: as :func:`gpus` returns them.
        where: how the message names the library.
    """
    for name, capability in gpus:
        if not any(_compile_cuda.runs_on(image, capability) for image in images):
            number = ".".join(map(str, capability))
            raise BuildError(
                f"the GPU {name} has compute capability {number}, {where} holds "
                f"{' '.join(images) or 'nothing'}; mend it with: export TORCH_CUDA_ARCH_LIST="
                f"{number} (the kernels need {_compile_cuda.OLDEST / 10} or newer)"
            )


def _recorded_images(record: Path) -> list[str]:
    try:
        return list(json.loads(record.read_text())["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"the record {record} cannot be read ({error})") from error


def _prebuilt(cuda: str, gpus: Sequence[tuple[str, tuple[int, int]]]) -> tuple[Path | None, str]:
    """The library inside the package if it serves here, else why not."""
    path, why = jit.prebuilt(_compile_cuda.LIBRARY_NAME, _compile_cuda.source_digest)
    if path is None:
        return None, why
    record = path.with_suffix(".json")
    built_for = json.loads(record.read_text()).get("cuda") or "unknown"
    if built_for.split(".")[0] != cuda.split(".")[0]:
        return None, f"the prebuilt library is for CUDA {built_for}, torch has CUDA {cuda}"
    try:
        check_images(_recorded_images(record), gpus, f"the CUDA library {path}")
    except BuildError as error:
        return None, str(error)
    return path, ""


def _load(wanted: str) -> tuple[Path, bool, str]:
    import torch

    jit.check_torch()
    version, cuda = str(torch.__version__), torch.version.cuda
    if cuda is None:
        _compile_cuda.toolkit_for(version, None)
    assert cuda is not None
    present = gpus()
    if not present and wanted == "auto":
        raise BuildError("torch finds no CUDA device")
    # An old card beside a new one must not switch the new one's kernels off.
    oldest = divmod(_compile_cuda.OLDEST, 10)
    present = [gpu for gpu in present if gpu[1] >= oldest] or present
    path, why = _prebuilt(cuda, present)
    if path is not None:
        try:
            torch.ops.load_library(str(path))
            images = _recorded_images(path.with_suffix(".json"))
            return path, False, f"prebuilt in the package, for {' '.join(images)}"
        except OSError as error:
            why = f"the prebuilt CUDA library does not load ({error})"
    if sys.platform == "win32":
        raise BuildError(f"{why}, and compiling on first use is not supported on Windows; use WSL")
    toolkit = _compile_cuda.toolkit_for(version, cuda)
    images = _compile_cuda.images_to_build(toolkit.known, [gpu[1] for gpu in present])
    check_images(images, present, "the CUDA library to be compiled")
    root = _compile.source_root()
    torch_root = Path(torch.__file__).resolve().parent
    key = _compile_cuda.build_key(root, toolkit, version, images)

    def make() -> tuple[Path, bool]:
        return jit.build(
            _compile_cuda.sources(root),
            key,
            compiler=toolkit.compiler,
            include_dirs=[root],
            torch_root=torch_root,
            flags=(*_compile_cuda.FLAGS, *_compile_cuda.image_flags(images)),
            link=_compile_cuda.link_flags(torch_root),
            stem="cuda",
            library=_compile_cuda.LIBRARY_NAME,
            facts={"images": images},
        )

    path, built = jit.open_built(make)
    state = "compiled" if built else "found"
    return path, built, f"{state} in the cache, for {' '.join(images)}; {why}"


def load() -> LoadResult:
    """Load the CUDA library once per process: prebuilt, cached, or compiled now (minutes).

    Safe to call from many threads and processes at once; later calls return the first call's
    result.

    Returns:
        LoadResult; ``loaded`` is False where torch has no CUDA, no GPU is visible, nvcc is missing
        or of another CUDA than torch, or the library's architectures do not serve the GPU. Where a
        GPU is visible that warns once (:class:`tta_ext.jit.NativeWarning`).

    Raises:
        RuntimeError: ``TTA_EXT_CUDA=1`` and the library cannot be had.
        ValueError: ``TTA_EXT_CUDA`` has another value than auto, 0, 1.
    """
    return _once()


def _attempt() -> LoadResult:
    return jit.attempt(
        "TTA_EXT_CUDA",
        _load,
        loss="tta_ext runs its PyTorch reference on CUDA tensors",
        mend="export CUDA_HOME=<the folder of another CUDA toolkit>",
        wanted_here=lambda: bool(gpus()),
    )


_once = Once(_attempt)

"""The CUDA library: toolkit, architectures, flags. Nothing here imports torch but :func:`gpus`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tta_ext.build.library import Library, NotNeeded
from tta_ext.build.toolchain import (
    CXX_FLAGS,
    BuildError,
    Compiler,
    Recipe,
    Torch,
    answer_of,
    find_compiler,
)

logger = logging.getLogger("tta_ext")

#: What the library is compiled for where nobody says and no GPU is seen.
ARCHITECTURES = ("80", "90", "100", "120")
#: The kernels use warp reductions that older GPUs do not have.
OLDEST = 80

#: Contraction is off on both sides, as in the CPU library; -lineinfo costs nothing at run time and
#: lets profilers and sanitizers name lines. The runtime is shared with torch's.
FLAGS = (
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-lineinfo",
    "-Xcompiler=-fPIC,-ffp-contract=off,-fno-math-errno,-fvisibility=hidden",
    *(flag for flag in CXX_FLAGS if flag.startswith("-D")),
    "-DUSE_CUDA",
)
#: Other ways to compute the same bits, of which only a GPU can say whether they are faster; names
#: for TTA_EXT_CUDA_VARIANT, a list. CMake has them as options.
VARIANTS = {"typed": "-DTTA_CUDA_TYPED", "float-division": "-DTTA_CUDA_FLOAT_DIVISION"}
#: Environment that nvcc adds to its command line by itself.
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")

#: A GPU: its name and its compute capability.
Gpu = tuple[str, tuple[int, int]]

_ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?", re.IGNORECASE)


@dataclass(frozen=True)
class Toolkit:
    """An nvcc: how it is called, its release (``13.0``) and the architectures it knows."""

    compiler: Compiler
    release: str
    known: frozenset[str]


def variant_flags() -> list[str]:
    """What ``TTA_EXT_CUDA_VARIANT`` asks the compiler for."""
    names = {n for n in re.split(r"[;,\s]+", os.environ.get("TTA_EXT_CUDA_VARIANT", "")) if n}
    if unknown := sorted(names - VARIANTS.keys()):
        raise BuildError(
            f"TTA_EXT_CUDA_VARIANT has {unknown[0]!r}, expected some of {', '.join(VARIANTS)}; "
            "mend it with: unset TTA_EXT_CUDA_VARIANT"
        )
    return [flag for name, flag in VARIANTS.items() if name in names]


def remedy(cuda: str | None = None) -> str:
    """The command that puts an nvcc of this CUDA (``13.0``; None: that one) beside torch.

    Of CUDA 12, pip has the parts that torch needs itself, but no nvcc.
    """
    version = cuda or "13.0"
    if int(version.split(".")[0]) < 13:
        command = f"conda install -y -c nvidia cuda-nvcc={version}"
    else:
        command = f"pip install 'cuda-toolkit[nvcc]=={version}.*'"
    return f"{command}, or export CUDA_HOME=<the folder of a CUDA {version.split('.')[0]} toolkit>"


def _named_home() -> Path | None:
    """The nvcc of the toolkit that the environment names."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable, "").strip():
            path = Path(home) / "bin" / "nvcc"
            if path.is_file():
                return path
            raise BuildError(
                f"no CUDA compiler: {variable}={home!r} has no bin/nvcc; "
                f"mend it with: export {variable}=<the folder of a CUDA toolkit>"
            )
    return None


def _in_site_packages(cuda: str | None) -> list[Path]:
    """The nvcc that pip has put beside torch, of CUDA's major version or of all, newest first."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    major = f"cu{cuda.split('.')[0]}" if cuda else "cu[0-9]*"
    found = [path for place in places for path in Path(place).glob(f"{major}/bin/nvcc")]
    return sorted(found, key=lambda path: path.parent.parent.name, reverse=True)


def _check_parts(nvcc: Path, cuda: str | None) -> None:
    """``BuildError`` unless the packages beside an nvcc of pip's are there, and of its release."""
    needed = {
        "nvidia-cuda-nvcc": "bin/ptxas",
        "nvidia-nvvm": "nvvm/bin/cicc",
        "nvidia-cuda-crt": "include/crt/host_config.h",
        "nvidia-cuda-runtime": "include/cuda_runtime.h",
    }
    releases = {}
    for name, file in needed.items():
        version = None
        if (nvcc.parent.parent / file).is_file():
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = ".".join(importlib.metadata.version(name).split(".")[:2])
        releases[name] = version or "missing"
    if len(set(releases.values())) > 1:
        parts = ", ".join(f"{name} {release}" for name, release in releases.items())
        wanted = cuda or releases["nvidia-cuda-nvcc"].replace("missing", "13.0")
        raise BuildError(
            f"the parts of the CUDA compiler {nvcc} do not belong together ({parts}); "
            f"mend it with: {remedy(wanted)}"
        )


def _asked(nvcc: Path) -> Toolkit:
    name, mend = f"the CUDA compiler {nvcc}", "export CUDA_HOME=<the folder of a CUDA toolkit>"
    text = answer_of([str(nvcc), "--version"], name, mend)
    release = re.search(r"release (\d+\.\d+)", text)
    version = re.search(r"V\d+\.\d+\.\d+", text)
    if release is None:
        raise BuildError(f"{name} does not say its release; mend it with: {mend}")
    codes = answer_of([str(nvcc), "--list-gpu-code"], name, mend)
    known = frozenset(re.findall(r"sm_(\d+[af]?)", codes))
    said = f"nvcc {version[0] if version else release[1]}"
    return Toolkit(Compiler((str(nvcc), *host_compiler()), said), release[1], known)


def find_toolkit(cuda: str | None = None) -> Toolkit:
    """The nvcc of ``CUDA_HOME``, else of ``CUDA_PATH``, else of the PATH, else of pip's packages
    (``site-packages/nvidia/cu13``).

    Args:
        cuda: the CUDA of torch (``13.0``). One of the PATH of another major version is passed over
            where pip's fits.

    Raises:
        BuildError: none was found, or it does not run; the message says what was looked for.
    """
    if home := _named_home():
        return _asked(home)
    on_path, installed = shutil.which("nvcc"), _in_site_packages(cuda)
    if on_path is not None:
        toolkit = _asked(Path(on_path))
        if not installed or cuda is None or _same_major(toolkit.release, cuda):
            return toolkit
    if not installed:
        raise BuildError(
            "no CUDA compiler: looked for nvcc in CUDA_HOME, CUDA_PATH, on the PATH and in "
            f"site-packages/nvidia; mend it with: {remedy(cuda)}"
        )
    _check_parts(installed[0], cuda)
    return _asked(installed[0])


def _same_major(one: str, other: str) -> bool:
    return one.split(".")[0] == other.split(".")[0]


def _runtime(toolkit: Toolkit) -> tuple[str, ...]:
    """How to link the CUDA runtime that torch has loaded: nvcc's way, or, as pip's packages have no
    file of the plain name that this looks for, by the file itself.
    """
    folder = Path(toolkit.compiler.command[0]).parent.parent / "lib"
    numbered = sorted(folder.glob("libcudart.so.*"))
    if not numbered or (folder / "libcudart.so").exists():
        return ("-cudart=shared",)
    return ("-cudart=none", f"-Xlinker={numbered[0]}")


def host_compiler() -> tuple[str, ...]:
    """nvcc's option for the C++ compiler of ``CXX``, where nothing else names one.

    ``CXX`` may hold words such as ``ccache g++``; nvcc takes a single program.
    """
    if not os.environ.get("CXX", "").strip() or os.environ.get("NVCC_CCBIN"):
        return ()
    return (f"-ccbin={find_compiler().command[-1]}",)


def check_release(toolkit: Toolkit, torch_cuda: str) -> None:
    """``BuildError`` unless the toolkit has the major version of torch's CUDA runtime."""
    if not _same_major(toolkit.release, torch_cuda):
        raise BuildError(
            f"nvcc at {toolkit.compiler.command[0]} is of CUDA {toolkit.release}, torch of CUDA "
            f"{torch_cuda}; mend it with: {remedy(torch_cuda)}"
        )


def gpus() -> list[Gpu]:
    """Every GPU that torch can use; empty without one.

    Raises:
        BuildError: torch cannot say.
    """
    try:
        import torch

        if torch.version.cuda is None or not torch.cuda.is_available():
            return []
        return [
            (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        ]
    except Exception as error:  # a broken driver must not fail an installation
        raise BuildError(
            f"torch cannot be asked for its GPUs ({type(error).__name__}: {error}); mend it with: "
            "a driver that this torch can use, or export TTA_EXT_CUDA=0"
        ) from error


def _number(image: str) -> int:
    return int(image.rpartition("_")[2].rstrip("af"))


def _listed(text: str) -> list[str]:
    """Images that ``TORCH_CUDA_ARCH_LIST`` asks for."""
    images = []
    for entry in re.split(r"[;,\s]+", text):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}, which is no architecture such as 9.0 or "
                "9.0+PTX; mend it with: export TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
            )
        major, minor, suffix, ptx = match.groups()
        number = f"{major}{minor}{suffix.lower()}"
        images += [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
    return images


def _seen(gpus: Sequence[Gpu], known: frozenset[str]) -> list[str]:
    """Images for GPUs: their own code, or the nearest PTX where nvcc is older than the GPU."""
    images = []
    for _, (major, minor) in gpus:
        own = f"{major}{minor}"
        older = sorted(int(n) for n in known if n.isdigit() and int(n) <= int(own))
        images += [f"sm_{own}"] if own in known else [f"compute_{n}" for n in older[-1:]]
    return images


def images_to_build(known: frozenset[str]) -> list[str]:
    """What the library shall hold: machine code (``sm_90``) and PTX (``compute_90``), sorted.

    ``TORCH_CUDA_ARCH_LIST`` decides if it is set (with PTX only where it asks for it), else the
    GPUs, else :data:`ARCHITECTURES`; the latter two with PTX of the newest, for GPUs to come.
    Architectures that nvcc does not know, or that are older than the kernels can do with, are left
    out, and a log message says so.

    Args:
        known: numbers of the architectures that nvcc knows, such as ``90`` or ``90a``.

    Raises:
        BuildError: an entry that is no architecture, or nothing is left.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if text:
        wanted = _listed(text)
    elif present := gpus():
        wanted = _seen(present, known)
    else:
        wanted = [f"sm_{number}" for number in ARCHITECTURES]
    kept = {i for i in wanted if i.partition("_")[2] in known and _number(i) >= OLDEST}
    limits = (
        f"nvcc knows sm_{' sm_'.join(sorted(known, key=_number))}, the kernels need sm_{OLDEST} "
        "or newer"
    )
    if not kept:
        raise BuildError(
            f"no architecture is left of {' '.join(wanted) or 'none'}: {limits}; "
            "mend it with: export TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        )
    if dropped := set(wanted) - kept:
        logger.warning("tta_ext: leaving out %s: %s", " ".join(sorted(dropped)), limits)
    if not text:
        kept.add(f"compute_{max(kept, key=_number).partition('_')[2]}")
    return sorted(kept, key=lambda image: (_number(image), image))


def runs_on(image: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU can run machine code or PTX of the library.

    Machine code runs on its own major version from its minor version up, PTX on everything newer;
    with the suffix ``a`` on exactly its GPU, with ``f`` on its major version.
    """
    own = divmod(_number(image), 10)
    if image.endswith("a"):
        return capability == own
    if image.startswith("compute_") and not image.endswith("f"):
        return capability >= own
    return capability[0] == own[0] and capability >= own


def _cuda_of(torch: Torch) -> str:
    if torch.cuda is None:
        raise NotNeeded(
            f"torch {torch.version} is built without CUDA; install a CUDA build of torch to mend it"
        )
    return torch.cuda


class CudaLibrary(Library):
    """The library of the CUDA kernels, on the CUDA runtime that torch has loaded."""

    device = "CUDA"
    name = "_C_cuda.so"
    variable = "TTA_EXT_CUDA"
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    source_globs = ("cuda/*.cu", "bind/cuda*.cpp")
    header_folders = ("core", "cuda", "bind")
    flags = FLAGS
    loss = "tta_ext runs its PyTorch reference on CUDA tensors"

    def recipe(self, torch: Torch) -> Recipe:
        """As :meth:`Library.recipe`; also raises if torch has no CUDA, no toolkit of its major
        version is here, or no architecture is left.
        """
        cuda, host = _cuda_of(torch), super().recipe(torch)
        toolkit = find_toolkit(cuda)
        check_release(toolkit, cuda)
        images = images_to_build(toolkit.known)
        gencode = (f"-gencode=arch=compute_{i.partition('_')[2]},code={i}" for i in images)
        link = ("-shared", *_runtime(toolkit), "-Xlinker=--as-needed,-z,defs")
        variables = (f"{name}={os.environ.get(name, '')}" for name in NVCC_VARIABLES)
        return dataclasses.replace(
            host,
            compiler=toolkit.compiler,
            # Compressed images take a quarter of the size.
            flags=(*FLAGS, *variant_flags(), *gencode, "-Xfatbin=-compress-all"),
            link=(*link, f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"),
            more=(host.compiler.version, *variables),
            record={
                **host.record,
                "images": images,
                "cuda": cuda,
                "variant": variant_flags(),
            },
        )

    def require(self, torch: Torch, wanted: str) -> None:
        _cuda_of(torch)
        if wanted == "auto" and not gpus():
            raise NotNeeded("torch finds no CUDA device")

    def check(self, record: Mapping[str, Any], torch: Torch) -> None:
        built_for, cuda = record.get("cuda") or "unknown", _cuda_of(torch)
        if built_for.split(".")[0] != cuda.split(".")[0]:
            raise BuildError(f"the prebuilt library is for CUDA {built_for}, torch has CUDA {cuda}")
        if list(record.get("variant", ())) != variant_flags():
            raise BuildError("the prebuilt library is not the variant of TTA_EXT_CUDA_VARIANT")
        images, present = record.get("images", ()), gpus()
        # An old card beside a new one must not switch the new one's kernels off.
        for name, capability in [g for g in present if g[1] >= divmod(OLDEST, 10)] or present:
            if not any(runs_on(image, capability) for image in images):
                number = ".".join(map(str, capability))
                raise BuildError(
                    f"the GPU {name} has compute capability {number}, the CUDA library holds "
                    f"{' '.join(images) or 'nothing'}; mend it with: export TORCH_CUDA_ARCH_LIST="
                    f"{number} (the kernels need {OLDEST / 10} or newer)"
                )

    def remedy(self) -> str:
        return "export CUDA_HOME=<the folder of another CUDA toolkit>"

"""How the CUDA library is compiled: toolkit, architectures, flags. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tta_ext import _compile
from tta_ext._compile import BuildError, Compiler

logger = logging.getLogger("tta_ext")

LIBRARY_NAME = "_C_cuda.so"
SOURCE_GLOBS = ("cuda/*.cu", "bind/cuda*.cpp")
HEADER_FOLDERS = ("core", "cuda", "bind")
HEADER_SUFFIXES = (*_compile.HEADER_SUFFIXES, ".cuh")

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
    *(flag for flag in _compile.CXX_FLAGS if flag.startswith("-D")),
    "-DUSE_CUDA",
)
#: Environment that nvcc adds to its command line by itself.
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")

#: The driver's numbers of a GPU's compute capability, major and minor.
_CAPABILITY = (75, 76)

_ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?", re.IGNORECASE)


@dataclass(frozen=True)
class Toolkit:
    """An nvcc: how it is called, its release (``13.0``) and the architectures it knows."""

    compiler: Compiler
    release: str
    known: frozenset[str]


def sources(root: Path) -> list[Path]:
    """Translation units of the CUDA library, sorted."""
    return _compile.files_of(root, SOURCE_GLOBS)


def headers(root: Path) -> list[Path]:
    """Every header that a translation unit of the CUDA library may include, sorted."""
    return _compile.headers_of(root, HEADER_FOLDERS, HEADER_SUFFIXES)


def source_digest(root: Path) -> str:
    """SHA-256 of the CUDA library's sources, headers and flags."""
    return _compile.digest_of(root, (*sources(root), *headers(root)), FLAGS)


def _nvcc_path() -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable, "").strip()
        if home:
            path = Path(home) / "bin" / "nvcc"
            if path.is_file():
                return path
            raise BuildError(
                f"no CUDA compiler: {variable}={home!r} has no bin/nvcc; "
                f"mend it with: export {variable}=<the folder of a CUDA toolkit>"
            )
    found = shutil.which("nvcc")
    if found is None:
        raise BuildError(
            "no CUDA compiler: looked for nvcc in CUDA_HOME, CUDA_PATH and on the PATH; "
            "mend it with: conda install -y -c nvidia cuda-nvcc, or export CUDA_HOME=<the folder "
            "of a CUDA toolkit>"
        )
    return Path(found)


def find_toolkit() -> Toolkit:
    """The nvcc of ``CUDA_HOME``, else of ``CUDA_PATH``, else of the PATH.

    Raises:
        BuildError: none was found, or it does not run; the message says what was looked for.
    """
    path = str(_nvcc_path())
    name, remedy = f"the CUDA compiler {path}", "export CUDA_HOME=<the folder of a CUDA toolkit>"
    text = _compile.answer_of([path, "--version"], name, remedy)
    release = re.search(r"release (\d+\.\d+)", text)
    version = re.search(r"V\d+\.\d+\.\d+", text)
    if release is None:
        raise BuildError(f"{name} does not say its release; mend it with: {remedy}")
    codes = _compile.answer_of([path, "--list-gpu-code"], name, remedy)
    known = frozenset(re.findall(r"sm_(\d+[af]?)", codes))
    compiler = Compiler((path, *host_compiler()), f"nvcc {version[0] if version else release[1]}")
    return Toolkit(compiler, release[1], known)


def host_compiler() -> tuple[str, ...]:
    """nvcc's option for the C++ compiler of ``CXX``, where nothing else names one.

    ``CXX`` may hold words such as ``ccache g++``; nvcc takes a single program.
    """
    if not os.environ.get("CXX", "").strip() or os.environ.get("NVCC_CCBIN"):
        return ()
    return (f"-ccbin={_compile.find_compiler().command[-1]}",)


def check_release(toolkit: Toolkit, torch_cuda: str) -> None:
    """``BuildError`` unless the toolkit has the major version of torch's CUDA runtime."""
    wanted = torch_cuda.split(".")[0]
    if toolkit.release.split(".")[0] != wanted:
        raise BuildError(
            f"nvcc at {toolkit.compiler.command[0]} is of CUDA {toolkit.release}, torch of CUDA "
            f"{torch_cuda}; mend it with: export CUDA_HOME=<the folder of a CUDA {wanted} toolkit>"
        )


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _listed(text: str) -> list[str]:
    """Images that ``TORCH_CUDA_ARCH_LIST`` asks for."""
    images = []
    for entry in re.split(r"[;,\s]+", text.strip()):
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


def _seen(capabilities: Sequence[tuple[int, int]], known: frozenset[str]) -> list[str]:
    """Images for GPUs: their own code, or the nearest PTX where nvcc is older than the GPU."""
    plain = sorted((number for number in known if number.isdigit()), key=int)
    images = []
    for major, minor in capabilities:
        own = f"{major}{minor}"
        if own in known:
            images += [f"sm_{own}"]
        else:
            images += [f"compute_{number}" for number in plain if int(number) <= int(own)][-1:]
    return images


def images_to_build(known: frozenset[str], capabilities: Sequence[tuple[int, int]]) -> list[str]:
    """What the library shall hold: machine code (``sm_90``) and PTX (``compute_90``), sorted.

    ``TORCH_CUDA_ARCH_LIST`` decides if it is set (with PTX only where it asks for it), else the
    GPUs of this machine, else :data:`ARCHITECTURES`; the latter two with PTX of the newest, for
    GPUs to come. Architectures that nvcc does not know, or that are older than the kernels can do
    with, are left out, and a log message says so.

    Args:
        known: numbers of the architectures that nvcc knows, such as ``90`` or ``90a``.
        capabilities: compute capability of each visible GPU.

    Raises:
        BuildError: an entry that is no architecture, or nothing is left.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if text:
        wanted = _listed(text)
    elif capabilities:
        wanted = _seen(capabilities, known)
    else:
        wanted = [f"sm_{number}" for number in ARCHITECTURES]
    kept: set[str] = set()
    dropped: set[str] = set()
    for image in wanted:
        number = image.partition("_")[2]
        usable = number in known and _number(number) >= OLDEST
        (kept if usable else dropped).add(image)
    if dropped:
        logger.warning(
            "tta_ext: leaving out %s: nvcc knows sm_%s, the kernels need sm_%d or newer",
            " ".join(sorted(dropped)),
            " sm_".join(sorted(known, key=_number)),
            OLDEST,
        )
    if not kept:
        raise BuildError(
            f"no architecture is left of {' '.join(wanted) or 'none'}: nvcc knows sm_"
            f"{' sm_'.join(sorted(known, key=_number))}, the kernels need sm_{OLDEST} or newer; "
            "mend it with: export TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        )
    if not text:
        newest = max((image.partition("_")[2] for image in kept), key=_number)
        kept.add(f"compute_{newest}")
    return sorted(kept, key=lambda image: (_number(image.partition("_")[2]), image))


def image_flags(images: Sequence[str]) -> list[str]:
    """nvcc's options that put the images into the library, compressed: a quarter of the size."""
    return [
        *(f"-gencode=arch=compute_{image.partition('_')[2]},code={image}" for image in images),
        "-Xfatbin=-compress-all",
    ]


def runs_on(image: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU can run machine code or PTX of the library.

    Machine code runs on its own major version from its minor version up, PTX on everything newer;
    with the suffix ``a`` on exactly its GPU, with ``f`` on its major version.
    """
    kind, _, number = image.partition("_")
    major, minor = divmod(_number(number), 10)
    if number.endswith("a"):
        return capability == (major, minor)
    if kind == "compute" and not number.endswith("f"):
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


def link_flags(torch_root: Path | None) -> list[str]:
    """Flags that make the shared library on the CUDA runtime that torch has loaded."""
    flags = ["-shared", "-cudart=shared", "-Xlinker=--as-needed,-z,defs"]
    if torch_root is not None:
        flags += [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    return flags


def build_key(root: Path, toolkit: Toolkit, torch_version: str, images: Sequence[str]) -> str:
    """SHA-256 that names a build of the CUDA library."""
    variables = (f"{name}={os.environ.get(name, '')}" for name in NVCC_VARIABLES)
    host = _compile.find_compiler().version
    return _compile.key_of(
        source_digest(root), toolkit.compiler, torch_version, host, *images, *variables
    )


def torch_cuda(torch_root: Path) -> tuple[str, str | None]:
    """(version of torch, version of its CUDA or None), from its files."""
    text = (torch_root / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']*)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= '([^']*)'", text, re.MULTILINE)
    return version[1] if version else "unknown", cuda[1] if cuda else None


def toolkit_for(version: str, cuda: str | None) -> Toolkit:
    """The toolkit that builds for this torch.

    Raises:
        BuildError: torch has no CUDA, or no toolkit of its major version is here.
    """
    if cuda is None:
        raise BuildError(
            f"torch {version} is built without CUDA; install a CUDA build of torch to mend it"
        )
    _compile.find_compiler()
    toolkit = find_toolkit()
    check_release(toolkit, cuda)
    return toolkit


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capability of every GPU that the driver shows this process; empty without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    capabilities = []
    for i in range(count.value):
        numbers = []
        for attribute in _CAPABILITY:
            if driver.cuDeviceGet(ctypes.byref(device), i) or driver.cuDeviceGetAttribute(
                ctypes.byref(value), attribute, device
            ):
                return []
            numbers.append(value.value)
        capabilities.append((numbers[0], numbers[1]))
    return capabilities


@dataclass(frozen=True)
class Plan:
    """How a wheel's library is compiled: toolkit, images, version of torch's CUDA."""

    toolkit: Toolkit
    images: list[str]
    cuda: str


def plan(torch_root: Path) -> Plan:
    """What a build of the CUDA library beside this torch will do.

    Raises:
        BuildError: torch has no CUDA, no toolkit of its major version is here, or there is no
            architecture to compile for.
    """
    version, cuda = torch_cuda(torch_root)
    toolkit = toolkit_for(version, cuda)
    return Plan(toolkit, images_to_build(toolkit.known, visible_gpus()), str(cuda))


def build_library(plan: Plan, output: Path, torch_root: Path, root: Path) -> dict[str, object]:
    """Compile the CUDA library into ``output``; what its record shall say."""
    _compile.compile_library(
        plan.toolkit.compiler,
        sources(root),
        output,
        include_dirs=[root],
        torch_root=torch_root,
        flags=(*FLAGS, *image_flags(plan.images)),
        link=link_flags(torch_root),
    )
    return {
        "digest": source_digest(root),
        "compiler": plan.toolkit.compiler.version,
        "images": plan.images,
        "cuda": plan.cuda,
    }

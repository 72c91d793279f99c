"""Which backend serves each op, and why not a faster one: the data behind ``tta doctor``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tta_ext import build, env
from tta_ext.build import LoadResult
from tta_ext.build.cache import cache_dir
from tta_ext.build.cuda import gpus


@dataclass(frozen=True)
class OpStatus:
    """One op: the backend that serves CPU tensors, and for each other backend why it does not
    serve.
    """

    name: str
    backend: str
    why_not: dict[str, str]


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


def _cpu_isa() -> str:
    level = int(torch.ops.tta_ext.cpu_isa(-1))
    return ("scalar", "avx2", "avx512")[level]


def diagnose() -> Diagnosis:
    """Load the native library as the first op would, then say what serves what.

    Never raises for a missing compiler, GPU or package: that is what it reports. It may compile
    the CPU library (about 20 s, once) and, where a GPU is visible, the CUDA library (minutes).
    """
    from tta_ext import dispatch, schemas

    try:
        native = build.load("cpu")
        unusable = dispatch.native_status()
    except RuntimeError as error:  # TTA_EXT_NATIVE=1
        native = LoadResult(False, str(error))
        unusable = native.reason
    try:
        cuda = build.load("cuda")
        no_cuda = dispatch.unavailable("cuda")
    except RuntimeError as error:  # TTA_EXT_CUDA=1
        cuda = LoadResult(False, str(error))
        no_cuda = cuda.reason
    ops = []
    for name in schemas.OPS:
        on_cpu = not unusable and dispatch.has_kernel(name, "cpu")
        why_not = {"cuda": no_cuda} if no_cuda else {}
        if not on_cpu:
            why_not["cpu"] = unusable or "the native library has no kernel for it"
        ops.append(OpStatus(name, "cpu" if on_cpu else "reference", why_not))
    return Diagnosis(
        env=env.collect(),
        native=native,
        cuda=cuda,
        cpu_isa=_cpu_isa() if native.loaded and not unusable else None,
        cache=str(cache_dir()),
        ops=ops,
        advice=_advice(native, cuda),
    )


def _advice(native: LoadResult, cuda: LoadResult) -> list[str]:
    advice = []
    for library in (native, cuda if gpus() else native):
        if not library.loaded:
            _, marker, command = library.reason.partition("mend it with: ")
            line = command if marker else library.reason
            advice += [] if line in advice else [line]
    if env.package_version("transformers") is None:
        advice.append("pip install 'tta-ext[hf]'  (to decode with transformers models)")
    return advice


def common_reasons(ops: list[OpStatus]) -> dict[str, str]:
    """Backends that serve no op, all for the same reason."""
    if not ops:
        return {}
    first = ops[0].why_not
    return {
        name: why for name, why in first.items() if all(op.why_not.get(name) == why for op in ops)
    }


def library_state(library: LoadResult) -> str:
    """How a library was found, in a line."""
    state = "not loaded"
    if library.loaded:
        state = f"loaded from {library.path} in {library.seconds:.2f} s"
    return f"{state}: {library.reason}"


def render(diagnosis: Diagnosis) -> str:
    """Plain text of a diagnosis, for terminals without rich and for tests."""
    lines = [f"{name:<20} {value}" for name, value in diagnosis.env.items()]
    lines += [
        f"{'native CPU library':<20} {library_state(diagnosis.native)}",
        f"{'CUDA library':<20} {library_state(diagnosis.cuda)}",
        f"{'instruction set':<20} {diagnosis.cpu_isa or 'none, the reference serves'}",
        f"{'build cache':<20} {diagnosis.cache}",
        "",
    ]
    common = common_reasons(diagnosis.ops)
    for op in diagnosis.ops:
        own = {name: why for name, why in op.why_not.items() if name not in common}
        reasons = "; ".join(f"not {name}: {why}" for name, why in own.items())
        lines.append(f"{op.name:<24} {op.backend:<10} {reasons}".rstrip())
    lines += [f"no op on {name}: {why}" for name, why in common.items()]
    if diagnosis.advice:
        lines += ["", *(f"to mend: {line}" for line in diagnosis.advice)]
    return "\n".join(lines)

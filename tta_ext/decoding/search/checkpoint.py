"""Files of runs that are put away: a tensor and a state, in safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from tta_ext.decoding.search.aisp_settings import AISPSettings
from tta_ext.decoding.search.outcome import Candidate, IterationRecord, Timing

__all__ = ["read", "write", "write_tensors"]

_KEY = "tta_ext.aisp"
_FORMAT = 3


def write(path: Path, mean: Tensor, state: dict[str, Any], model: Any) -> None:
    """Write u and a JSON-able state of a run of a model; the file appears whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    facts = json.dumps(state | {"format": _FORMAT, "model": weights_mark(model)})
    write_tensors(path, {"mean": mean}, {_KEY: facts}, "the checkpoint")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], what: str
) -> None:
    """Write a safetensors file, which appears whole, or not at all; into a device or pipe as it is.

    Args:
        path: the file; a link stays one.
        tensors: copied to the CPU.
        metadata: of the file's head.
        what: what an error calls the file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    content = save({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata=metadata)
    real = Path(os.path.realpath(path))
    whole = real.is_file() or not real.exists()
    partial = real.with_name(f"{real.name}.{os.getpid()}.part") if whole else real
    try:
        with partial.open("wb") as file:
            file.write(content)
            if whole:
                file.flush()
                os.fsync(file.fileno())
        if whole:
            os.replace(partial, real)
    except OSError as error:
        if whole:
            partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {what} {path}: {error}") from error


def weights_mark(model: Any) -> str:
    """Tells a model from others: a hash over name, shape, dtype and a few numbers of each weight.

    Weights that accelerate keeps elsewhere, or that are packed, count without their numbers.
    """
    found = []
    for name, weight in model.named_parameters():
        plain = type(weight) is torch.nn.Parameter and not weight.is_meta
        few = weight.detach().flatten()[:: max(1, weight.numel() // 16)] if plain else None
        numbers = None if few is None else few.double().tolist()
        found.append([name, list(weight.shape), str(weight.dtype), numbers])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def read(path: Path, model: Any) -> tuple[Tensor, dict[str, Any]]:
    """u and the state.

    Raises:
        ValueError: no such file, one of another kind or version, one whose state is not whole, or
            one of a run of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})[_KEY])
            mean = file.get_tensor("mean")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no AISP run ({error})") from error
    _check(state, mean, path)
    if state["model"] != weights_mark(model):
        raise ValueError(f"{path} holds a run of another model; remove it or name another")
    return mean, state


# What a state holds; see :meth:`AISPSearch.save`.
_STATE: dict[str, Any] = {
    "format": int,
    "model": str,
    "settings": dict[str, Any],
    "sigma": float,
    "seed": int,
    "sequence": list[int],
    "iteration": int,
    "prompts": list[Any],
    "encoded": list[list[int]],
    "stopped": list[str],
    "candidates": list[list[dict[str, Any]]],
    "curves": list[list[dict[str, Any]]],
    "timing": dict[str, Any],
}


def _check(state: Any, mean: Tensor, path: Path) -> None:
    """Refuse a state unless it is one that :func:`write` may have written, whole."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path} holds no AISP run that can go on: {what}")

    if not isinstance(state, dict):
        raise wrong("its state is no object")
    if state.get("format") != _FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, expected {_FORMAT}")
    _fields(state, _STATE, "the state", wrong)
    _fields(state["settings"], get_type_hints(AISPSettings), "settings", wrong)
    _fields(state["timing"], get_type_hints(Timing), "timing", wrong)
    for name, kind in (("candidates", Candidate), ("curves", IterationRecord)):
        for one in (one for row in state[name] for one in row):
            _fields(one, get_type_hints(kind), f"an entry of {name}", wrong)
    try:
        settings = AISPSettings(**state["settings"])
    except (TypeError, ValueError) as error:
        raise wrong(str(error)) from error
    prompts, done = len(state["prompts"]), state["iteration"]
    for name in ("sequence", "encoded", "stopped", "candidates", "curves"):
        if len(state[name]) != prompts:
            raise wrong(f"{name} has {len(state[name])} entries for {prompts} prompts")
    if not 0 <= done <= settings.iterations:
        raise wrong(f"iteration is {done}, and {settings.iterations} were to be done")
    if not 0.0 <= state["sigma"] < math.inf:
        raise wrong(f"sigma is {state['sigma']}")
    for why, curve, found in zip(
        state["stopped"], state["curves"], state["candidates"], strict=True
    ):
        if why not in _REASONS:
            raise wrong(f"stopped has {why!r}")
        if len(curve) > done or (not why and len(curve) != done):
            raise wrong(f"a curve has {len(curve)} iterations of {done}")
        if len(found) != settings.n * len(curve):
            raise wrong(f"a prompt has {len(found)} candidates, expected {settings.n * len(curve)}")
    if mean.dtype != torch.float32 or not bool(torch.isfinite(mean).all()):
        raise wrong("u is not float32, or not finite")


_REASONS = ("", "iterations", "reward", "ess", "seconds")


def _fields(
    found: Any, expected: Mapping[str, Any], what: str, wrong: Callable[[str], ValueError]
) -> None:
    """Refuse a JSON object with other fields than these, or of other types."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise wrong(f"{what} has not the fields {', '.join(expected)}")
    for name, kind in expected.items():
        if not _fits(found[name], kind):
            raise wrong(f"{name} of {what} is {shorten(repr(found[name]), 60)}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has a type."""
    inner = get_args(kind)
    origin = get_origin(kind) or kind
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)

"""Files of runs that are put away: a tensor and a state, in safetensors."""

from __future__ import annotations

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

__all__ = ["read", "write"]

_KEY = "tta_ext.aisp"
_FORMAT = 3


def write(path: Path, mean: Tensor, state: dict[str, Any]) -> None:
    """Write u and a JSON-able state; the file appears whole, or not at all."""
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    metadata = {_KEY: json.dumps(state | {"format": _FORMAT})}
    save_file({"mean": mean.cpu().contiguous()}, partial, metadata=metadata)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """u and the state.

    Raises:
        ValueError: no such file, one of another kind or version, or one whose state is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})[_KEY])
            mean = file.get_tensor("mean")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no AISP run ({error})") from error
    _check(state, mean, path)
    return mean, state


# What a state holds; see :meth:`AISPSearch.save`.
_STATE: dict[str, Any] = {
    "format": int,
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

"""Files of runs that are put away: a tensor and a state, in safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["read", "write"]

_KEY = "tta_ext.aisp"
_FORMAT = 2


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
        ValueError: no such file, or one of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})[_KEY])
            mean = file.get_tensor("mean")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no AISP run ({error})") from error
    if state["format"] != _FORMAT:
        raise ValueError(f"{path} has format {state['format']}, expected {_FORMAT}")
    return mean, state

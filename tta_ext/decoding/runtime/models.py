"""Facts about a causal language model of transformers, whatever its family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch

__all__ = [
    "class_name",
    "device_of",
    "embedding_count",
    "head_inputs",
    "loaded",
    "logit_count",
    "position_limit",
    "refuse_path",
]


def class_name(model: Any) -> str:
    """What messages call a model's class."""
    return type(getattr(model, "inner", model)).__name__


def device_of(model: Any) -> torch.device:
    """Where a model takes its token ids."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type != "meta":
        return device
    # Offloaded: its weights come only for the forward, to where its hook says.
    hook = getattr(embeddings, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def embedding_count(model: Any) -> int:
    """Number of ids that a model has an embedding for."""
    embeddings = model.get_input_embeddings()
    count: int | None = getattr(embeddings, "num_embeddings", None)
    return embeddings.weight.shape[0] if count is None else count


def logit_count(model: Any) -> int:
    """Number of logits that a model gives, padding included."""
    return _linear(model, "out_features", 0)


def head_inputs(model: Any) -> int:
    """Size of the vector that a model's head takes, the pre-logits."""
    return _linear(model, "in_features", 1)


@contextmanager
def loaded(module: Any) -> Iterator[Any]:
    """A module with its weights, which accelerate may keep elsewhere between forwards."""
    if not hasattr(module, "_hf_hook"):
        yield module
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield module


def _linear(model: Any, name: str, axis: int) -> int:
    # Quantised weights are packed; the layer still knows its size.
    head = model.get_output_embeddings()
    size: int | None = getattr(head, name, None)
    return head.weight.shape[axis] if size is None else size


def position_limit(model: Any) -> int | None:
    """Tokens that a model has positions for; None if its configuration does not say.

    Scaled rotary embeddings reach as far as their factor says, whatever ``max_position_embeddings``
    is: checkpoints are configured with the one or the other changed.
    """
    text = model.config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if limit is not None and limit < 1:  # XLNet's -1: relative positions, without end
        return None
    given = getattr(text, "rope_parameters", None) or {}
    for rope in given.values() if "rope_type" not in given else [given]:
        if limit is None or not isinstance(rope, dict):
            continue
        if rope.get("rope_type") == "dynamic":
            return None
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, round(original * (rope.get("factor") or 1.0)))
    return limit


def refuse_path(model: Any, name: str, owner: str) -> None:
    """``TypeError`` for a path in a model's place."""
    if isinstance(model, (str, PathLike)):
        raise TypeError(
            f"{name} is {model!r}, expected a model; {owner}.from_pretrained loads it from there"
        )

"""What the loops ask of a causal language model."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["device_of", "logits_of"]


def logits_of(model: Any) -> int:
    """Number of logits of a model."""
    return model.get_output_embeddings().weight.shape[0]


def device_of(model: Any) -> torch.device:
    """The device on which a model takes token ids."""
    return model.get_input_embeddings().weight.device

"""Which attention a model has, whether rows of different length can share it, and its masks.

A forward over rows of different length needs an explicit mask ``[rows, 1, columns, width]`` and
explicit positions. This module finds out from a model's configuration which masks it wants (as
transformers' ``create_masks_for_generate`` does) and builds them; for a model that cannot work this
way it has the reason, and :mod:`lockstep` runs it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.runtime import compat
from tta_ext.decoding.runtime.models import class_name

__all__ = ["MaskBuilder", "check_model", "ragged_refusal"]

log = logging.getLogger("tta_ext")

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_IMPLEMENTATIONS = ("sdpa", "eager")
# Model types whose attention slices a mask of its own by the longest row.
_OWN_MASKS = ("gpt_neo",)


def check_model(model: Any, role: str) -> None:
    """Refuse what no runner can decode.

    Args:
        model: a transformers causal language model.
        role: what the message calls it, such as ``"base"``.

    Raises:
        TypeError: not a causal language model with a forward and a configuration.
        ValueError: the model is of a kind that cannot be used, in one sentence with the reason.
    """
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "forward", None)):
        raise TypeError(
            f"{role} is a {type(model).__name__}, expected a transformers causal language model"
        )
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder; only decoder-only models are supported"
    elif (head := model.get_output_embeddings()) is None:
        reason = "has no language-model head; load it with AutoModelForCausalLM"
    elif isinstance(head, torch.nn.ModuleList):
        reason = f"has {len(head)} heads, of codes that belong together, not one over a vocabulary"
    if reason is not None:
        raise ValueError(f"{role} ({class_name(model)}) {reason}")


def ragged_refusal(model: Any) -> str | None:
    """Why rows of different length cannot share this model's cache; None if nothing is known."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    attends = bool(kinds) and all(kind in _LAYER_TYPES for kind in kinds)
    # A class of hybrids may have models with attention in every layer.
    if compat.is_recurrent(model) and not attends:
        return (
            "keeps a recurrent state instead of keys and values, "
            "which can neither lag behind nor be rolled back"
        )
    if model.config.model_type in _OWN_MASKS:
        return (
            "cuts its local attention by the longest row of the batch, "
            "so rows of different length cannot share one"
        )
    windows = (getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None))
    if any(windows) and not kinds and not compat.masks_windows(model):
        return "has a window in its configuration of which its own attention masks know nothing"
    both_ways = getattr(text, "use_bidirectional_attention", None)
    # "vision": only image tokens see what comes after them.
    if both_ways not in (None, False, "vision") or not getattr(text, "is_causal", True):
        return "attends in both directions"
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            return (
                f"has layers of type {kind!r}, whose state can neither lag behind "
                f"nor be rolled back here; supported are {', '.join(_LAYER_TYPES)}"
            )
    for needed in (compat.cache_argument(model), "position_ids", "attention_mask"):
        if not compat.accepts(model, needed):
            return f"takes no {needed}, so rows of different length cannot share a batch"
    return use_masked_attention(model)


def use_masked_attention(model: Any) -> str | None:
    """Switch a model to an attention that takes a mask per row; the reason if it cannot be."""
    implementation = compat.attention_implementation(model.config.get_text_config())
    if implementation in _IMPLEMENTATIONS:
        return None
    try:
        model.set_attn_implementation("sdpa")
    except (AttributeError, ImportError, ValueError):
        return (
            f"uses attn_implementation={implementation!r}, which takes no mask "
            'per row; load it with attn_implementation="sdpa"'
        )
    log.warning(
        f"{class_name(model)} uses attn_implementation={implementation!r}, which takes no mask per "
        'row; it has been switched to "sdpa"'
    )
    return None


class MaskBuilder:
    """Additive masks for one model: 0 where a query may look, the dtype's minimum elsewhere.

    Args:
        config: the model's text configuration.
        dtype: dtype of the mask, the model's.
        device: device of the mask.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        window = getattr(config, "sliding_window", None)
        chunk = getattr(config, "attention_chunk_size", None)
        types = getattr(config, "layer_types", None)
        self.keyed = types is not None
        if types is None:
            kind = "sliding" if window else "chunked" if chunk else "full"
            types = [f"{kind}_attention"]
        self.types = tuple(dict.fromkeys(types))
        self.window, self.chunk = int(window or 0), int(chunk or 0)
        self.zero = torch.zeros((), dtype=dtype, device=device)
        self.minimum = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.positions = torch.arange(256, device=device)

    def __call__(self, query: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """The mask, or one for each layer type, of queries at positions ``query``.

        Args:
            query: int64 ``[rows, columns]``.
            width: number of keys, at positions 0 to ``width - 1``.

        Returns:
            ``[rows, 1, columns, width]`` in the form that the model's forward takes.
        """
        if width > self.positions.shape[0]:
            self.positions = torch.arange(2 * width, device=self.positions.device)
        key = self.positions[:width]
        query = query[:, None, :, None]
        causal = key <= query
        masks = {}
        for kind in self.types:
            seen = causal
            if kind == "sliding_attention":
                seen = causal & (key > query - self.window)
            elif kind == "chunked_attention":
                seen = causal & (key // self.chunk == query // self.chunk)
            masks[kind] = torch.where(seen, self.zero, self.minimum)
        return masks if self.keyed else masks[self.types[0]]

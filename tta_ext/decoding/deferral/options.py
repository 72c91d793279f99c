"""The options of decoding with deferral, and what some of them may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypedDict

import torch
from torch import Tensor

from tta_ext.rules import Rule

__all__ = ["DRAFTS", "GenerationOptions", "draft_length", "draft_source"]

# Who guesses.
DRAFTS: Final = ("proxy", "base", "lookup")


class GenerationOptions(TypedDict, total=False):
    """The keywords of :meth:`KnapsackDeferral.generate` that say what is generated."""

    proxy_prompts: Any
    input_ids: Tensor | None
    attention_mask: Tensor | None
    proxy_input_ids: Tensor | None
    proxy_attention_mask: Tensor | None
    max_new_tokens: int
    do_sample: bool
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | torch.Generator | None
    sequence: Sequence[int] | Tensor | None
    num_return_sequences: int
    rule: str | Rule | None
    param: float | Tensor | Sequence[float] | None
    critical: str | None
    temperature: float | None
    rule_temperature: float | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    logits_processor: Any
    stopping_criteria: Any
    padded_context: bool
    pad_token_id: int | None
    lazy: bool
    trace: bool | str
    speculative: int | str | None
    num_assistant_tokens: int | str | None
    draft: str | None
    errors: str


def draft_length(value: int | str | None) -> int | str | None:
    """The argument ``speculative`` itself if it makes sense.

    Raises:
        ValueError: it is not None, ``"auto"`` or a length from 1 to 64.
    """
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
        raise ValueError(
            f"speculative is {value!r}, expected None, 'auto' or a draft length from 1 to 64"
        )
    return value


def draft_source(value: str | None) -> str | None:
    """The argument ``draft`` itself if it makes sense.

    Raises:
        ValueError: it is not None, ``"proxy"``, ``"base"`` or ``"lookup"``.
    """
    if value is not None and value not in DRAFTS:
        raise ValueError(f"draft is {value!r}, expected None or one of {', '.join(DRAFTS)}")
    return value

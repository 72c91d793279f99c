"""The options of decoding with deferral, and what some of them may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypedDict

import torch
from torch import Tensor

from tta_ext.rules import Rule

__all__ = [
    "DRAFTS",
    "SPENDING",
    "AnswerBudget",
    "GenerationOptions",
    "draft_length",
    "draft_source",
]

# Who guesses.
DRAFTS: Final = ("proxy", "base", "lookup")
# How an answer's budget is spent.
SPENDING: Final = ("greedy", "running")


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
    answer_budget: float | None
    answer_spending: str | None


class AnswerBudget(NamedTuple):
    """A bound on the tokens of an answer that the proxy may write.

    Attributes:
        share: of the answer's tokens, 0 to 1.
        running: whether it holds of every beginning of the answer (``"running"``); else of an
            answer of the most tokens, first come, first served (``"greedy"``).
    """

    share: float
    running: bool

    @classmethod
    def of(cls, share: float | None, spending: str | None) -> AnswerBudget | None:
        """From the arguments ``answer_budget`` and ``answer_spending``; None without a budget.

        Raises:
            ValueError: a share outside 0 to 1, an unknown way to spend, or one without a budget.
        """
        if share is None:
            if spending is not None:
                raise ValueError(f"answer_spending is {spending!r} without an answer_budget")
            return None
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not (number and 0.0 <= share <= 1.0):
            raise ValueError(f"answer_budget is {share!r}, expected a share from 0 to 1")
        spending = "greedy" if spending is None else spending
        if spending not in SPENDING:
            raise ValueError(
                f"answer_spending is {spending!r}, expected one of {', '.join(SPENDING)}"
            )
        return cls(float(share), spending == "running")

    def allows(self, spent: int, written: int, most: int) -> bool:
        """Whether the proxy may write the next token.

        Args:
            spent: tokens that it has written.
            written: the answer's tokens so far.
            most: ``max_new_tokens``.
        """
        # 0.29 * 100 is a little less than 29.
        return spent + 1 <= self.share * (written + 1 if self.running else most) + 1e-9


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

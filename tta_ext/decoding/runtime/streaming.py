"""Answers as they grow: events for Python, and feeding transformers' streamers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["StreamEvent", "TextDeltas"]


@dataclass(frozen=True)
class StreamEvent:
    """One token of one answer.

    Attributes:
        row: which answer, in the order of the result.
        token: its id.
        text: text that became certain with it; may be empty while a character is incomplete. None
            without a tokenizer.
        deferred: whether the proxy wrote it.
        finish: None while the answer goes on, else why it ended.
    """

    row: int
    token: int
    text: str | None
    deferred: bool
    finish: str | None


class TextDeltas:
    """Incremental detokenization: new text of a growing token list.

    Text is held back while it ends in an incomplete character. Only the last few tokens are decoded
    again at each step.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._written = 0

    def push(self, token: int, last: bool = False) -> str:
        """Add a token; the new text. ``last`` flushes what was held back."""
        self._tokens.append(token)
        decode = self._tokenizer.decode
        before = decode(self._tokens[self._start : self._written], skip_special_tokens=True)
        now = decode(self._tokens[self._start :], skip_special_tokens=True)
        if len(now) <= len(before) or (now.endswith("�") and not last):
            return ""
        # Keep the previous piece as context: some tokenizers space words by what stands before.
        self._start, self._written = self._written, len(self._tokens)
        return now[len(before) :]

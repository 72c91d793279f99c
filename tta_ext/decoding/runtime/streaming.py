"""Answers as they grow: events for Python, and feeding transformers' streamers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from tta_ext.decoding.runtime.generate_options import check_processors
from tta_ext.decoding.runtime.prompts import text_of
from tta_ext.decoding.runtime.stopping import StopStrings

__all__ = ["StreamEvent", "TextDeltas", "check_streamer"]


def check_streamer(streamer: Any) -> None:
    """Refuse what is no streamer, or one that cannot be used here.

    Raises:
        TypeError: it has not the methods ``put`` and ``end``, or is a class.
        ValueError: a streamer of transformers for another kind of model.
    """
    methods = (getattr(streamer, name, None) for name in ("put", "end"))
    if isinstance(streamer, type) or not all(map(callable, methods)):
        raise TypeError(f"streamer is {streamer!r}, expected an object with put and end")
    check_processors([streamer])


@dataclass(frozen=True)
class StreamEvent:
    """One token of one answer.

    Attributes:
        row: which answer, in the order of the result.
        token: its id; -1 where the answer ended with ``"error"`` and nothing could be drawn.
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

    Text is held back while it ends in an incomplete character, or in what may become a stop string.
    All pieces together are the answer's text: decoded as a whole and cut before a stop string.
    (Broken fallback bytes can make characters before them unreadable too; what is out stays.)

    Args:
        tokenizer: decodes tokens; without a ``backend_tokenizer``, all of them again at each step.
        stop: strings that end the answer and are no part of its text.
    """

    def __init__(self, tokenizer: Any, stop: StopStrings | None = None) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""

    def push(self, token: int, last: bool = False) -> str:
        """Add a token; the new text. ``last`` flushes what was held back."""
        self._tokens.append(token)
        return self._out(
            self._whole(last) if last or self._backend is None else self._step(token), last
        )

    def flush(self) -> str:
        """What was held back, where no token follows."""
        return self._out(self._whole(True), True)

    def _out(self, new: str, last: bool) -> str:
        self._decoded += len(new)
        if self._stop is None:
            return new
        text = self._held + new
        safe = self._stop.cut(text) if last else self._stop.safe(text)
        self._held = text[len(safe) :]
        return safe

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception:  # it gives up at broken bytes that change the text before them
            self._backend = None
            return self._whole()

    def _whole(self, last: bool = False) -> str:
        text = text_of(self._tokenizer, self._tokens)
        return "" if text.endswith("\ufffd") and not last else text[self._decoded :]

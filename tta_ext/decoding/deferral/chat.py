"""A conversation with a pair of models, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from typing_extensions import Unpack

from tta_ext.decoding.deferral.options import GenerationOptions
from tta_ext.decoding.deferral.request import Request
from tta_ext.decoding.deferral.result import Generation
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.streaming import StreamEvent

__all__ = ["Chat"]


class Chat:
    """Messages so far, and both models' caches of them.

    At each turn the whole conversation is rendered with each model's template; the part that a
    cache already holds is not run again. A model in lock-step reads it all anew.

    Args:
        request: makes a turn's request, :meth:`KnapsackDeferral.request`.
        system: a system message to start with.
        options: for every turn, as in :meth:`KnapsackDeferral.generate`.

    Attributes:
        messages: the conversation, ``{"role", "content"}`` dicts; may be edited between turns.
        last: the latest turn's :class:`Generation`.

    Example:
        >>> chat = kad.chat(system="Answer briefly.", seed=0)
        >>> chat.send("What is a knapsack?")
        >>> chat.send("And its dual?")
    """

    def __init__(
        self,
        request: Callable[..., Request],
        system: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        self._request, self._options = request, options
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.last: Generation | None = None
        self._runners: Sequence[ModelRunner] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.messages)} messages>"

    def send(self, text: str, **options: Unpack[GenerationOptions]) -> str:
        """Say something and return the whole answer."""
        for _ in self.stream(text, **options):
            pass
        assert self.last is not None
        return self.last.text

    def stream(self, text: str, **options: Unpack[GenerationOptions]) -> Iterator[StreamEvent]:
        """Say something and yield the answer's tokens; the turn is kept once all have come."""
        turn = {"role": "user", "content": text}
        request = self._request([[*self.messages, turn]], **{**self._options, **options})
        if len(request.base) != 1:
            raise ValueError("a conversation has one answer a turn; num_return_sequences must be 1")
        (batch,) = request.batches(None)
        loop = request.start(batch, events=True, runners=self._runners)
        # Until the turn is complete nothing relies on these caches.
        self._runners = None
        yield from request.stream(loop)
        self._runners = loop.runners
        self.last = request.result(batch, loop)
        self.messages += [turn, {"role": "assistant", "content": self.last.text}]

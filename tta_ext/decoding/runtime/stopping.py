"""When a row is done: end-of-sequence ids, stop strings, transformers' stopping criteria."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["StopStrings", "end_ids"]


def end_ids(
    given: int | Iterable[int] | None, models: Sequence[Any], tokenizers: Sequence[Any]
) -> frozenset[int]:
    """Ids that end an answer.

    Args:
        given: the caller's choice, which wins; an empty iterable means that nothing ends it.
        models: models whose generation configurations say what ends an answer, in union, since
            either model may end it in its own way.
        tokenizers: tokenizers that are asked where no model knows.
    """
    if given is not None:
        return frozenset([given] if isinstance(given, int) else (int(i) for i in given))
    found: set[int] = set()
    for model in models:
        config = getattr(model, "generation_config", None)
        value = getattr(config, "eos_token_id", None)
        if value is None:
            value = getattr(model.config.get_text_config(), "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    if not found:
        found.update(
            t.eos_token_id for t in tokenizers if getattr(t, "eos_token_id", None) is not None
        )
    return frozenset(found)


class StopStrings:
    """Finds stop strings in growing token lists, wherever token borders lie.

    Args:
        strings: the stop strings, none empty.
        tokenizer: decodes tokens.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        if not all(isinstance(s, str) and s for s in self.strings):
            raise ValueError(f"stop_strings is {strings!r}, expected strings that are not empty")
        if tokenizer is None:
            raise ValueError("stop_strings need a tokenizer; pass tokenizer=")
        self._tokenizer = tokenizer
        # A character may take four byte-level tokens.
        self._window = 4 * max(len(s) for s in self.strings) + 4

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the newest token completed a stop string."""
        text = self._tokenizer.decode(tokens[-self._window :], skip_special_tokens=False)
        return any(s in text for s in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string in it."""
        ends = [at for at in map(text.find, self.strings) if at >= 0]
        return text[: min(ends)] if ends else text

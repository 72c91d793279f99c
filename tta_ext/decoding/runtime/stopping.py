"""When a row is done: end-of-sequence ids, stop strings, transformers' stopping criteria."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tta_ext.decoding.runtime.prompts import integers, is_id, text_of

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

    Raises:
        TypeError: the caller's are no integers.
    """
    if given is not None:
        return frozenset(integers([given] if is_id(given) else given, "eos_token_id"))
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

    The verdicts are those of transformers' ``StopStringCriteria``, which reads the whole vocabulary
    first, looks at prompts too, and does not know every tokenizer's characters of several tokens.

    Args:
        strings: the stop strings, none empty.
        tokenizer: decodes tokens.

    Raises:
        TypeError: no strings.
        ValueError: an empty string, or no tokenizer.
    """

    @classmethod
    def of(cls, strings: str | Sequence[str] | None, tokenizer: Any) -> StopStrings | None:
        """The stop strings of a call; None if there are none."""
        if strings is None or (isinstance(strings, (list, tuple)) and not strings):
            return None
        return cls(strings, tokenizer)

    def __init__(self, strings: str | Sequence[str], tokenizer: Any) -> None:
        if isinstance(strings, (bytes, Mapping)) or not isinstance(strings, Iterable):
            raise TypeError(f"stop_strings is {strings!r}, expected a string or several")
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        if not all(isinstance(s, str) and s for s in self.strings):
            raise ValueError(f"stop_strings is {strings!r}, expected strings that are not empty")
        if tokenizer is None:
            raise ValueError("stop_strings need a tokenizer; pass tokenizer=")
        self._tokenizer = tokenizer
        # Decoders treat the first word in their own way, so the answer's text comes after another.
        self._before = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
        self._skip = len(text_of(tokenizer, self._before, special=True))
        # A character may take four byte-level tokens.
        self._window = 4 * max(map(len, self.strings), default=0) + 4

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the newest token completed a stop string."""
        window = [*self._before, *tokens[-self._window :]]
        text = text_of(self._tokenizer, window, special=True)[self._skip :]
        return any(s in text for s in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string in it."""
        ends = [at for at in map(text.find, self.strings) if at >= 0]
        return text[: min(ends)] if ends else text

    def safe(self, text: str) -> str:
        """The text that no later token can cut: what stands before the start of a stop string."""
        found = self.cut(text)
        if len(found) < len(text):
            return found
        starts = (s[:n] for s in self.strings for n in range(len(s) - 1, 0, -1))
        return text[: len(text) - max((len(s) for s in starts if text.endswith(s)), default=0)]

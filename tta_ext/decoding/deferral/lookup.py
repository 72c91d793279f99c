"""Drafting by copying: what followed the same words before may follow them again.

Known as prompt lookup or n-gram speculation: answers that quote their prompt, edit code or repeat
themselves get drafts without a second model.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Lookup"]

# Tokens that must recur, longest first; one alone is too often chance.
SIZES = (4, 3, 2)


class Lookup:
    """Where each n-gram of a growing text occurred last."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        self._read = 0

    def guess(self, tokens: Sequence[int], length: int) -> list[int]:
        """What followed the longest n-gram that ends the text, where it occurred before.

        Args:
            tokens: the whole text, which begins with what an earlier call has seen.
            length: of the guess at most. A repetition that reaches the end of the text goes on.

        Returns:
            ``length`` tokens, or none where nothing recurs.
        """
        end = len(tokens)
        # The n-grams that end the text are left for the next call: they have no successor yet.
        for place in range(max(self._read, 1), end):
            for size in SIZES:
                if place >= size:
                    self._behind[tuple(tokens[place - size : place])] = place
        self._read = end
        for size in SIZES:
            found = self._behind.get(tuple(tokens[-size:])) if end > size else None
            if found is not None:
                guess: list[int] = []
                for i in range(found, found + length):
                    guess.append(tokens[i] if i < end else guess[i - end])
                return guess
        return []

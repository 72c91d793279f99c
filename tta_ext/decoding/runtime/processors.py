"""transformers' logits processors and stopping criteria over rows of different length.

Processors get the tokens of a sequence and its scores. They see the base's sequence (prompt and
answer) for both models, so both distributions are changed by the same function. Rows of one prompt
length form a group and are processed together without padding, so what a row gets does not depend
on its neighbours. (Rows that come padded to one length, as from ``generate`` of transformers, are
one group, padding and all.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

__all__ = ["SequenceView", "as_criteria", "as_processors"]


class SequenceView:
    """The sequences that processors and criteria look at.

    Args:
        prompts: ids of each row's prompt.
        room: tokens that will be appended at most.
        device: device of the ids.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: torch.device) -> None:
        width = max(map(len, prompts), default=0) + room
        self._tokens = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self._tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self._lengths = [len(p) for p in prompts]

    def write(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add one token to some rows."""
        place = [self._lengths[row] for row in rows]
        block = torch.tensor([list(rows), place, list(tokens)], device=self._tokens.device)
        self._tokens[block[0], block[1]] = block[2]
        for row in rows:
            self._lengths[row] += 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt included; setting it takes tokens back or gives them again."""
        return self._lengths.copy()

    @lengths.setter
    def lengths(self, value: Sequence[int]) -> None:
        self._lengths = list(value)

    def keep(self, rows: Sequence[int], index: Tensor) -> None:
        """Drop all rows but these."""
        self._tokens = self._tokens.index_select(0, index)
        self._lengths = [self._lengths[row] for row in rows]

    def _groups(self, rows: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
        """(length, rows, places in ``rows``) of each group of equal length."""
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for place, row in enumerate(rows):
            members, places = groups.setdefault(self._lengths[row], ([], []))
            members.append(row)
            places.append(place)
        return [(length, members, places) for length, (members, places) in groups.items()]

    def process(self, processors: Any, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Scores of some rows after the processors.

        Args:
            processors: called as ``processors(input_ids, scores)``.
            logits: ``[len(rows), V]``.
            rows: which rows; None for all.

        Returns:
            float32 ``[len(rows), V]``.
        """
        scores = logits.to(torch.float32, copy=True)
        rows = range(len(self._lengths)) if rows is None else rows
        groups = self._groups(rows)
        if len(groups) == 1 and len(groups[0][1]) == len(self._lengths):
            return processors(self._tokens[:, : groups[0][0]], scores)
        for length, members, places in groups:
            scores[places] = processors(self._tokens[members, :length], scores[places])
        return scores

    def stopped(
        self, criteria: Any, logits: Tensor, rows: Sequence[int] | None = None
    ) -> list[bool]:
        """Which rows the criteria end; called as ``criteria(input_ids, scores)``.

        Args:
            criteria: transformers' stopping criteria.
            logits: ``[len(rows), V]``.
            rows: which rows to ask about; None for all.
        """
        rows = range(len(self._lengths)) if rows is None else rows
        done = [False] * len(rows)
        for length, members, places in self._groups(rows):
            verdict = criteria(self._tokens[members, :length], logits[places])
            if isinstance(verdict, bool):
                verdict = [verdict] * len(members)
            for place, value in zip(places, verdict, strict=True):
                done[place] = bool(value)
        return done


def as_processors(processors: Any) -> LogitsProcessorList | None:
    """A processor list from one processor, several, or none."""
    return _as_list(processors, LogitsProcessorList)


def as_criteria(criteria: Any) -> StoppingCriteriaList | None:
    """A criteria list from one criterion, several, or none."""
    return _as_list(criteria, StoppingCriteriaList)


def _as_list(given: Any, kind: Any) -> Any:
    items = [] if given is None else given if isinstance(given, Sequence) else [given]
    if not items:
        return None
    return items if isinstance(items, kind) else kind(items)

"""transformers' logits processors and stopping criteria over rows of different length.

Processors get the tokens of a sequence and its scores. They see the base's sequence (prompt and
answer) for both models, so both distributions are changed by the same function. Rows of one length
form a group and are processed together without padding, so what a row gets does not depend on its
neighbours. (Rows that come padded to one length, as from ``generate`` of transformers, are one
group, padding and all.)

Some hold something for each row of the call, such as the padding that a repetition penalty leaves
out. Those of transformers that do (:data:`~tta_ext.decoding.runtime.generate_options.PROCESSORS`),
all criteria, and under ``generate`` of transformers everyone's own processors too, see all rows of
the call at their places, where answers that have ended go on as padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

from tta_ext.decoding.runtime.compat import of_one_row
from tta_ext.decoding.runtime.generate_options import PROCESSORS, check_processors, kind_of
from tta_ext.decoding.runtime.prompts import is_id

__all__ = ["AtTemperature", "SequenceView", "TopP", "as_criteria", "as_processors", "warpers"]


class AtTemperature(LogitsProcessor):
    """Processors that see the scores divided by a temperature, which the scores then lose again.

    The temperature belongs to the rule, but what is left of a distribution depends on it. Scores
    that the processors leave alone keep their bits.

    Args:
        temperature: above 0.
        processors: called one after another.
    """

    def __init__(self, temperature: float, processors: Sequence[Any]) -> None:
        self.temperature, self.processors = temperature, LogitsProcessorList(processors)

    def around(self, scores: Tensor, run: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """The scores after ``run(processors, scores / temperature)``."""
        scaled = scores / self.temperature
        changed = run(self.processors, scaled)
        return torch.where(changed == scaled, scores, changed * self.temperature)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.around(scores, lambda processors, scaled: processors(input_ids, scaled))


class TopP(LogitsProcessor):
    """Keeps the smallest set of most probable tokens with at least a mass.

    As ``TopPLogitsWarper``, which of equal logits keeps the last or any: here the first stay.

    Args:
        top_p: the mass, above 0; 1 keeps all.
        temperature: at which it is measured.
    """

    def __init__(self, top_p: float, temperature: float = 1.0) -> None:
        self.top_p, self.temperature = top_p, temperature

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        if self.top_p >= 1.0:
            return scores
        ordered, order = scores.float().sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered / self.temperature, dim=-1)
        # A token goes if those before it have the mass already; the first always stays.
        gone = p.cumsum(-1) - p >= self.top_p
        gone[..., 0] = False
        return scores.masked_fill(gone.scatter(-1, order, gone), float("-inf"))


def warpers(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> list[LogitsProcessor]:
    """Processors that cut a distribution as ``generate`` of transformers does, in its order.

    Args:
        temperature: at which ``top_p`` and ``min_p`` measure.
        top_k: keep the k most probable tokens, and those tied with the last; at least 1.
        top_p: keep the smallest set with this mass; above 0, at most 1.
        min_p: keep tokens with this share of the highest probability; 0 to 1.

    Raises:
        ValueError: a value out of range.
    """
    if top_k is not None and not (is_id(top_k) and top_k >= 1):
        raise ValueError(f"top_k is {top_k!r}, expected an integer of at least 1")
    if top_p is not None and not (_is_real(top_p) and 0.0 < top_p <= 1.0):
        raise ValueError(f"top_p is {top_p!r}, expected 0 < top_p <= 1")
    if min_p is not None and not (_is_real(min_p) and 0.0 <= min_p <= 1.0):
        raise ValueError(f"min_p is {min_p!r}, expected 0 to 1")
    found: list[LogitsProcessor] = []
    if top_k is not None:
        found.append(TopKLogitsWarper(int(top_k)))
    if top_p is not None:
        found.append(TopP(float(top_p), temperature))
    if min_p is not None:
        found.append(AtTemperature(temperature, [MinPLogitsWarper(float(min_p))]))
    return found


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class SequenceView:
    """The sequences that processors and criteria look at.

    Args:
        prompts: ids of each prompt of the call.
        room: tokens that will be appended at most.
        device: device of the ids.
        pad: what stands for the tokens of an answer that has ended.
        rows: numbers of the prompts that are decoded now; None for all.
        whole: everyone's own processors see every row of the call, and criteria no logits, as in
            transformers' own loop.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        room: int,
        device: torch.device,
        *,
        pad: int = 0,
        rows: Sequence[int] | None = None,
        whole: bool = False,
    ) -> None:
        width = max(map(len, prompts), default=0) + room
        self._tokens = torch.full((len(prompts), width), pad, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self._tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self._lengths = [len(p) for p in prompts]
        self._numbers = list(range(len(prompts)) if rows is None else rows)
        self._pad, self._whole = pad, whole

    def write(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add one token to some rows."""
        numbers = [self._numbers[row] for row in rows]
        place = [self._lengths[number] for number in numbers]
        block = torch.tensor([numbers, place, list(tokens)], device=self._tokens.device)
        self._tokens[block[0], block[1]] = block[2]
        for number in numbers:
            self._lengths[number] += 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt included; setting it takes tokens back or gives them again."""
        return [self._lengths[number] for number in self._numbers]

    @lengths.setter
    def lengths(self, value: Sequence[int]) -> None:
        for number, length in zip(self._numbers, value, strict=True):
            self._lengths[number] = length

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these. Their tokens stay, for processors that see every row."""
        self._numbers = [self._numbers[row] for row in rows]

    def _groups(self, rows: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
        """(length, numbers, places in ``rows``) of each group of equal length."""
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for place, row in enumerate(rows):
            number = self._numbers[row]
            members, places = groups.setdefault(self._lengths[number], ([], []))
            members.append(number)
            places.append(place)
        return [(length, members, places) for length, (members, places) in groups.items()]

    def _everyone(self, length: int) -> Tensor:
        """The first tokens of every row of the call, ``[all, length]``, padded behind its end."""
        lengths = torch.tensor(self._lengths, device=self._tokens.device)
        ended = torch.arange(length, device=self._tokens.device) >= lengths[:, None]
        return self._tokens[:, :length].masked_fill(ended, self._pad)

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
        groups = self._groups(range(len(self._numbers)) if rows is None else rows)
        if len(groups) == 1:
            return self._run(processors, scores, groups[0][0], groups[0][1])
        for length, members, places in groups:
            scores[places] = self._run(processors, scores[places], length, members)
        return scores

    def _run(self, processors: Any, scores: Tensor, length: int, members: list[int]) -> Tensor:
        """Processors over rows of one length, by their numbers."""
        ids, total = self._tokens[members, :length], len(self._tokens)
        for one in processors if isinstance(processors, Sequence) else [processors]:
            if isinstance(one, AtTemperature):
                scores = one.around(
                    scores, lambda inner, scaled: self._run(inner, scaled, length, members)
                )
            elif isinstance(one, PrefixConstrainedLogitsProcessor):
                parts = [
                    of_one_row(one, number)(ids[i : i + 1], scores[i : i + 1])
                    for i, number in enumerate(members)
                ]
                scores = torch.cat(parts)
            elif total == len(members) or self._by_row(one):
                scores = _checked(one, one(ids, scores), scores)
            else:
                every = scores.new_zeros(total, scores.shape[1])
                every[members] = scores
                scores = _checked(one, one(self._everyone(length), every), every)[members]
        return scores

    def _by_row(self, processor: Any) -> bool:
        """Whether a processor may get some of the rows."""
        option = kind_of(PROCESSORS, processor)
        if option is None:
            return isinstance(processor, TopP) or not self._whole
        return option.by_row

    def stopped(
        self, criteria: Any, logits: Tensor, rows: Sequence[int] | None = None
    ) -> list[bool]:
        """Which rows the criteria end; called as ``criteria(input_ids, scores)``.

        Args:
            criteria: transformers' stopping criteria.
            logits: ``[len(rows), V]``.
            rows: which rows to ask about; None for all.
        """
        rows = range(len(self._numbers)) if rows is None else rows
        done = [False] * len(rows)
        for length, members, places in self._groups(rows):
            scores = None if self._whole else logits
            if scores is not None and len(members) < len(self._tokens):
                scores = logits.new_zeros(len(self._tokens), logits.shape[1])
                scores[members] = logits[places]
            verdict = criteria(self._everyone(length), scores)
            if isinstance(verdict, bool):
                verdict = [verdict] * len(self._tokens)
            for place, number in zip(places, members, strict=True):
                done[place] = bool(verdict[number])
        return done


def _checked(processor: Any, found: Any, given: Tensor) -> Tensor:
    """A processor's scores, if that is what it returned."""
    if not isinstance(found, Tensor) or found.shape != given.shape or found.dtype.is_complex:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(
            f"logits processor {type(processor).__name__} returned {what}, expected scores "
            f"{list(given.shape)}"
        )
    return found.to(given.dtype)


def as_processors(processors: Any) -> LogitsProcessorList | None:
    """A processor list from one processor, several, or none.

    Raises:
        TypeError: one of them cannot be called.
        ValueError: one that cannot be used in a loop with drafts and a second model.
    """
    return _as_list(processors, LogitsProcessorList, "logits_processor")


def as_criteria(criteria: Any) -> StoppingCriteriaList | None:
    """A criteria list from one criterion, several, or none; errors as :func:`as_processors`."""
    return _as_list(criteria, StoppingCriteriaList, "stopping_criteria")


def _as_list(given: Any, kind: Any, name: str) -> Any:
    items = [] if given is None else given if isinstance(given, Sequence) else [given]
    for one in items:
        if isinstance(one, type) or not callable(one):
            kind = isinstance(one, type)
            what = f"the class {one.__name__}" if kind else f"a {type(one).__name__}"
            raise TypeError(f"{name} has {what}, expected callables (ids, scores)")
    check_processors(items)
    if not items:
        return None
    return items if isinstance(items, kind) else kind(items)

"""One model whose rows advance together, on the cache that ``generate`` would give it.

Some models cannot take rows of different length into one forward: they keep a recurrent state,
count positions themselves, or have a cache of their own. They run as ``generate`` runs them:
prompts padded on the left, the arguments that ``generate`` prepares and updates, one token a row a
step. Rows never lag, and drafts are taken back from all rows alike, where the cache can be cropped.
A recurrent state would have to be copied before each draft, and read on anew with what stood of it:
as much work as drafts save, and few models read several tokens on from a state at all.
Rows that have ended leave by the cache's own method; where there is none that can be trusted, the
state is dropped and the rows are run anew from their tokens.

A model whose rotary factors follow the longest row of the batch runs rows of different length
*apart*, in groups of equal length, so that no row depends on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.runtime.compat import DecodingState, reset_rotary
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.profiling import span

__all__ = ["LockstepRunner"]


class _Group:
    """Rows that share forwards.

    Attributes:
        rows: their numbers.
        ids, mask: int64 ``[rows, columns]``, padded on the left.
        padding: columns before each row's tokens.
        state: what the model keeps of the first :attr:`fed` columns; None if nothing.
        held: the state before the last column, for :meth:`LockstepRunner.hold`.
    """

    def __init__(self, rows: list[int], ids: Tensor, mask: Tensor, padding: list[int]) -> None:
        self.rows, self.ids, self.mask, self.padding = rows, ids, mask, padding
        self.fed = 0
        self.state: DecodingState | None = None
        self.held: DecodingState | None = None

    def append(self, tokens: Tensor) -> None:
        """Add columns, int64 ``[rows, columns]``."""
        self.ids = torch.cat((self.ids, tokens), dim=1)
        self.mask = torch.cat((self.mask, self.mask.new_ones(tokens.shape)), dim=1)
        self.held = None

    def cut(self, width: int) -> None:
        """Take columns back from ``width`` on, and from the state what follows on them."""
        self.ids, self.mask = self.ids[:, :width], self.mask[:, :width]
        if self.fed <= width or self.state is None:
            return
        if self.state.croppable:
            self.state.crop(self.fed - width)
            self.fed = width
        else:
            self.state, self.fed = None, 0

    def select(self, rows: list[int], places: list[int], copy: bool, anew: bool) -> _Group:
        """A group of some of these rows, repeated as needed."""
        index = torch.tensor(places, dtype=torch.int64, device=self.ids.device)
        padding = [self.padding[place] for place in places]
        group = _Group(rows, self.ids[index], self.mask[index], padding)
        state = self.state
        if state is not None and places != list(range(len(self.rows))):
            state = deepcopy(state) if copy and not anew else state
            state = None if anew else state.select(index, len(self.rows))
        elif copy:
            state = deepcopy(state)
        if state is not None:
            group.state, group.fed = state, self.fed
        return group


class LockstepRunner(ModelRunner):
    """A model and the rows it decodes, which advance together.

    Args:
        model, prompts, room, vocabulary, masked, name: as for
            :class:`~tta_ext.decoding.runtime.runner.Runner`.
        pad: id of the padding, which some models look at; None: the model's.
        apart: rows of different length do not share a forward.
        anew: run rows anew when others leave, as the model's cache cannot pick rows.
    """

    kind = "lockstep"
    lags = False

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        vocabulary: int,
        masked: Tensor | None = None,
        name: str = "model",
        pad: int | None = None,
        apart: bool = False,
        anew: bool = False,
    ) -> None:
        super().__init__(model, vocabulary, masked, name)
        self._apart, self._anew = apart, anew
        generation = getattr(model, "generation_config", None)
        owners = (model.config.get_text_config(), model.config, generation)
        pads = [pad, *(getattr(owner, "pad_token_id", None) for owner in owners)]
        self._pad = next((pad for pad in pads if isinstance(pad, int) and pad >= 0), 0)
        self._groups: list[_Group] = []
        self._load(prompts, room)

    # ---- tokens ------------------------------------------------------------------------------

    def _load(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        super()._load(prompts, room)
        self._room = room
        self._logits: Tensor | None = None
        members: dict[int, list[int]] = {}
        for row, prompt in enumerate(self._tokens):
            members.setdefault(len(prompt) if self._apart else 0, []).append(row)
        self._groups = [self._group(rows) for rows in members.values()]
        self._place()

    def _group(self, rows: list[int]) -> _Group:
        width = max(len(self._tokens[row]) for row in rows)
        padding = [width - len(self._tokens[row]) for row in rows]
        ids = [[self._pad] * n + self._tokens[row] for n, row in zip(padding, rows, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        return _Group(
            rows,
            torch.tensor(ids, device=self.device),
            torch.tensor(mask, device=self.device),
            padding,
        )

    def _place(self) -> None:
        lengths = [len(tokens) for tokens in self._tokens]
        self._total = torch.tensor(lengths, dtype=torch.int64, device=self.device)

    @property
    def total(self) -> Tensor:
        return self._total

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self._tokens]

    def reload(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Replace the rows' tokens; the model reads them anew."""
        self._load(prompts, room)

    def append(self, tokens: Sequence[int], newest: Tensor | None = None) -> None:
        """Add one token a row; one that is negative, of a row that will leave, is never fed."""
        for row, token in zip(self._tokens, tokens, strict=True):
            row.append(token)
        self._columns([[token] for token in tokens])
        self._total.add_(1)

    def _columns(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add columns, as many to each row."""
        block = torch.tensor(tokens, dtype=torch.int64, device=self.device).clamp_(min=0)
        for group in self._groups:
            group.append(block if len(group.rows) == self.count else block[group.rows])
        self._logits = None

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        assert len(rows) == self.count
        self.append(tokens)

    def scrub(self, row: int) -> None:
        """Nothing: what was taken back is cut off."""

    def rollback(self, kept: Sequence[int], tails: Sequence[Sequence[int]]) -> None:
        total = [length + len(tail) for length, tail in zip(kept, tails, strict=True)]
        for row, (length, tail) in enumerate(zip(kept, tails, strict=True)):
            self._tokens[row][length:] = tail
        for group in self._groups:
            placed = list(zip(group.rows, group.padding, strict=True))
            width = max(padding + total[row] for row, padding in placed)
            staying = [(row, n) for row, n in placed if n + total[row] == width]
            # What follows on a column is no longer true if one row has another token there.
            group.cut(min(width - 1, *(n + kept[row] for row, n in staying)))
            first = group.ids.shape[1]
            rest = [self._tokens[row][first - n :] for row, n in placed]
            rest = [tokens + [self._pad] * (width - first - len(tokens)) for tokens in rest]
            group.append(torch.tensor(rest, dtype=torch.int64, device=self.device))
        self._logits = None
        self._place()

    def keep(self, rows: Sequence[int]) -> None:
        self._take(self, rows)

    def adopt(self, source: LockstepRunner, rows: Sequence[int], room: int) -> None:
        self._room, self._apart, self._anew = room, source._apart, source._anew
        self._take(source, rows, copy=True)

    def _take(self, source: LockstepRunner, rows: Sequence[int], copy: bool = False) -> None:
        groups = []
        for group in source._groups:
            place = {row: i for i, row in enumerate(group.rows)}
            mine = [i for i, row in enumerate(rows) if row in place]
            if mine:
                groups.append(group.select(mine, [place[rows[i]] for i in mine], copy, self._anew))
        self._tokens = [source._tokens[row].copy() for row in rows]
        self.count, self._groups, self._logits = len(self._tokens), groups, None
        self._place()

    # ---- forwards ----------------------------------------------------------------------------

    def prefill(self) -> None:
        """Nothing: the first step feeds the whole prompts, as ``generate`` does."""

    def settle(self) -> None:
        for group in self._groups:
            if group.fed < group.ids.shape[1] - 1:
                self._feed(group, group.ids.shape[1] - 1)

    def score(self, drafts: Sequence[Sequence[int]]) -> Tensor:
        self.settle()
        for row, draft in zip(self._tokens, drafts, strict=True):
            row += draft
        self._columns(drafts)
        self._place()
        return self._gather([self._feed(group, group.ids.shape[1]) for group in self._groups])

    def hold(self) -> None:
        for group in self._groups:
            # A prompt of one token would be nothing but padding; such a group is run anew.
            if not group.fed and bool((group.mask.sum(-1) > 1).all()):
                self._feed(group, group.ids.shape[1] - 1)
                group.held = group.state

    def step(self) -> Tensor:
        """Feed the one pending token of every row, or the last token anew.

        Returns:
            Logits ``[rows, vocabulary]`` in the model's dtype.
        """
        found = []
        for group in self._groups:
            width = group.ids.shape[1]
            if group.held is not None:
                group.state, group.fed = deepcopy(group.held), width - 1
            elif group.fed == width:
                group.state, group.fed = None, 0
            found.append(self._feed(group, width)[:, -1])
        self._logits = self._gather(found)
        return self._logits

    def _gather(self, found: Sequence[Tensor]) -> Tensor:
        """What the groups have found, in the order of the rows."""
        if len(found) == 1:
            return found[0]
        logits = found[0].new_empty(self.count, *found[0].shape[1:])
        for group, part in zip(self._groups, found, strict=True):
            logits[group.rows] = part
        return logits

    def catch_up(self, rows: Sequence[int] | None = None, index: Tensor | None = None) -> Tensor:
        """Logits ``[len(rows), vocabulary]`` after each row's last token; all rows are fed."""
        logits = self.step() if self._logits is None else self._logits
        if rows is None or len(rows) == self.count:
            return logits
        return logits[torch.tensor(rows, device=self.device) if index is None else index]

    def _feed(self, group: _Group, width: int) -> Tensor:
        """Feed a group's columns up to ``width``, in one forward; its logits of those columns."""
        state, columns = group.state, width - group.fed
        ids, mask = group.ids[:, :width], group.mask[:, :width]
        if state is None:
            columns = 1  # generate() keeps the logits of a prompt's last token
            state = DecodingState(self.model, ids, mask, self._room, self._pad)
        if self._apart:
            reset_rotary(self.model)
        start = perf_counter()
        with span(self.name):
            logits = state.feed(ids, columns)
        self.seconds += perf_counter() - start
        self.calls += 1
        self.rows_run += len(group.rows)
        rows = len(group.rows)
        self.tokens_run += rows * (width - group.fed) if group.fed else int(mask.sum())
        group.state, group.fed = state, width
        return self.allowed(logits)

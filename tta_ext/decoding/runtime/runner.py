"""One model in the decoding loop: its tokens, its ragged cache, its forwards.

A row holds ``total`` tokens, of which the first ``cached`` have keys in the cache; the others are
*pending*. A forward feeds pending tokens and returns the logits after each row's last token. In the
plain case every row has one pending token (:meth:`Runner.step`). The lazy proxy's rows collect
pending tokens until their logits are wanted (:meth:`Runner.catch_up`). A prompt, except its last
token, goes through :meth:`Runner.prefill`.

Tokens and lengths live on the host, in plain lists, so no forward waits for the device; what a
plain step needs on the device (lengths, positions, buffer indices) is one small tensor that moves
on by one addition. Between two forwards of a model everything is cold, and each call costs several
times what a benchmark of it alone would say: few calls matter more than cheap ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta_ext.decoding.runtime.attention import MaskBuilder
from tta_ext.decoding.runtime.cache import Plan, RaggedCache
from tta_ext.decoding.runtime.compat import accepts, cache_argument
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.profiling import span

__all__ = ["Runner"]

# Padded tokens of one prefill call at most; longer rows go alone.
PREFILL_TOKENS = 8192
# Positions to allocate beyond the prompts at first; most answers end before their limit.
FIRST_ROOM = 256


class Runner(ModelRunner):
    """A model and the rows it decodes, each at its own length.

    Args:
        model: a causal language model that
            :func:`~tta_ext.decoding.runtime.attention.ragged_refusal` has nothing against.
        prompts: token ids of each row, none empty.
        room: number of tokens that will be appended to a row at most.
        vocabulary: number of leading logits to return.
        masked: ids below ``vocabulary`` that must never be drawn, or None.
        name: name in profiles and messages.
        contiguous: as for :class:`RaggedCache`.
    """

    kind = "ragged"
    lags = True

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        vocabulary: int,
        masked: Tensor | None = None,
        name: str = "model",
        contiguous: bool = False,
    ) -> None:
        super().__init__(model, vocabulary, masked, name)
        self._cache_argument = cache_argument(model)
        self._keep_last = accepts(model, "logits_to_keep")
        self._masks = MaskBuilder(model.config.get_text_config(), model.dtype, self.device)
        self.cache = RaggedCache(0, 0, contiguous)
        self._load(prompts, room)

    # ---- tokens ------------------------------------------------------------------------------

    def _load(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        super()._load(prompts, room)
        self._total = [len(prompt) for prompt in prompts]
        self._prompt = self._total.copy()
        self._cached = [0] * self.count
        # Rows with equal prompts share their prefill.
        first: dict[tuple[int, ...], int] = {}
        self._group = [first.setdefault(tuple(p), row) for row, p in enumerate(prompts)]
        longest = max(self._total, default=0)
        self._limit = longest + room
        if self.cache.rows != self.count:
            room = longest + min(room, FIRST_ROOM)
            self.cache = RaggedCache(self.count, room, self.cache.contiguous)
        self._place()

    def _place(self) -> None:
        """Make the device's copy of lengths anew: rows have left, or their cache has moved."""
        self._width = max(self._total, default=0)
        capacity = self.cache.capacity
        state = [
            self._total,
            [total - 1 for total in self._total],
            [row * capacity + total - 1 for row, total in enumerate(self._total)],
        ]
        self._state = torch.tensor(state, dtype=torch.int64, device=self.device)
        self._position = self._state[1].view(-1, 1)
        self._plan = Plan(self._state[2], self.count, self._width)
        self._newest: Tensor | None = None

    def reload(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Replace the rows' tokens, keeping the cache as far as they begin with the old ones."""
        keep = len(prompts) == self.count == self.cache.rows
        old = [row[:n] for row, n in zip(self._tokens, self._cached, strict=True)]
        self._load(prompts, room)
        if not keep:
            return
        for row, (before, prompt) in enumerate(zip(old, prompts, strict=True)):
            # The last token is always fed, as its logits are wanted.
            limit = min(len(before), len(prompt) - 1)
            self._cached[row] = next((i for i in range(limit) if before[i] != prompt[i]), limit)

    def replace(self, row: int, tokens: Sequence[int]) -> None:
        """Make a row hold other tokens, keeping its cache as far as they begin with the old ones.

        Args:
            row: which.
            tokens: at least one, and not more than any row may have.
        """
        before = self._tokens[row][: self._cached[row]]
        limit = min(len(before), len(tokens) - 1)
        same = limit if before[:limit] == list(tokens[:limit]) else 0
        if same < limit:
            same = next(i for i in range(limit) if before[i] != tokens[i])
        self._tokens[row] = list(tokens)
        self._total[row] = self._prompt[row] = len(tokens)
        self._cached[row], self._group[row] = same, row
        self._place()

    def append(self, tokens: Sequence[int], newest: Tensor | None = None) -> None:
        for row, token in zip(self._tokens, tokens, strict=True):
            row.append(token)
        self._total = [total + 1 for total in self._total]
        self._width += 1
        self._state.add_(1)
        self._newest = newest

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            self._tokens[row].append(token)
            self._total[row] += 1
        self._place()

    def rollback(self, kept: Sequence[int], tails: Sequence[Sequence[int]]) -> None:
        # Keys of the tokens kept stay cached; the others' are written over by and by.
        for row, (length, tail) in enumerate(zip(kept, tails, strict=True)):
            tokens = self._tokens[row]
            del tokens[length:]
            tokens += tail
            self._total[row] = len(tokens)
            # The last token is always fed, as its logits are wanted.
            self._cached[row] = min(self._cached[row], length, len(tokens) - 1)
        self._place()

    def scrub(self, row: int) -> None:
        """Zero what a row's cache holds behind its cached tokens.

        Tokens that were taken back may have left NaN there, which reaches through any mask: a
        masked position still enters attention as 0 * value.
        """
        self.cache.clear(row, self._cached[row])

    @property
    def total(self) -> Tensor:
        return self._state[0]

    def keep(self, rows: Sequence[int]) -> None:
        if rows and any(self._cached):
            self.cache.keep(torch.tensor(rows, device=self.device), max(self._cached))
        self._tokens = [self._tokens[row].copy() for row in rows]
        self._prompt = [self._prompt[row] for row in rows]
        self._total = [self._total[row] for row in rows]
        self._cached = [self._cached[row] for row in rows]
        self.count = len(rows)
        first: dict[int, int] = {}
        self._group = [first.setdefault(self._group[row], i) for i, row in enumerate(rows)]
        self._place()

    def adopt(self, source: Runner, rows: Sequence[int], room: int) -> None:
        self._load([source.tokens(row) for row in rows], room)
        width = max(self._total, default=0)
        self._make_room(width)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.cache.adopt(source.cache, index, width)
        self._cached = self._total.copy()

    # ---- forwards ----------------------------------------------------------------------------

    def prefill(self) -> None:
        """Cache the prompts of rows with nothing cached, all but a row's last token.

        Rows with equal prompts are run once and copied. Prompts are padded on the right and need no
        mask: under causal attention nobody sees the padding.
        """
        lengths = {}
        for row, (prompt, total) in enumerate(zip(self._prompt, self._total, strict=True)):
            length = min(prompt, total - 1)
            if length and not self._cached[row]:
                lengths[row] = length
        first: dict[int, int] = {}
        leader = {row: first.setdefault(self._group[row], row) for row in lengths}
        leaders = sorted(first.values(), key=lambda row: -lengths[row])
        while leaders:
            width = lengths[leaders[0]]
            batch = leaders[: max(1, PREFILL_TOKENS // width)]
            del leaders[: len(batch)]
            self._prefill(batch, [lengths[row] for row in batch], width)
        target = [row for row in lengths if leader[row] != row]
        if target:
            source = [leader[row] for row in target]
            self.cache.copy_rows(
                torch.tensor(source, device=self.device),
                torch.tensor(target, device=self.device),
                max(lengths[row] for row in target),
            )
        for row, length in lengths.items():
            self._cached[row] = length

    def _prefill(self, rows: list[int], lengths: list[int], width: int) -> None:
        self._make_room(width)
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        slots = np.full((len(rows), width), self.cache.trash, dtype=np.int64)
        columns = np.arange(width)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[i, :length] = self._tokens[row][:length]
            slots[i, :length] = columns[:length] + row * self.cache.capacity
        self.cache.plan = Plan(self._put(slots.reshape(-1)), len(rows), width, fresh=True)
        position = self._put(np.tile(columns, (len(rows), 1)))
        self._forward(self._put(tokens), position, None, sum(lengths))

    def hold(self) -> None:
        """Prefill; a token that is fed again is written over itself."""
        self.prefill()

    def step(self) -> Tensor:
        width = self._width
        self._make_room(width)
        plan = self.cache.plan = self._plan
        plan.width = width
        tokens = self._newest
        if tokens is None:
            tokens = torch.tensor([row[-1] for row in self._tokens], device=self.device)
        position = self._position
        mask = self._masks(position, width)
        logits = self._forward(tokens.view(-1, 1), position, mask, self.count)
        self._cached = self._total.copy()
        return logits[:, -1]

    @property
    def lengths(self) -> list[int]:
        return self._total

    def catch_up(self, rows: Sequence[int] | None = None, index: Tensor | None = None) -> Tensor:
        """Feed all pending tokens of some rows, which may be many, in one call.

        A row with nothing pending has its last token fed again.
        """
        if rows is None:
            rows = range(self.count)
        ends, starts = self._total, self._cached
        for row in rows:
            starts[row] = min(starts[row], ends[row] - 1)
        if len(rows) == self.count and max([ends[row] - starts[row] for row in rows]) == 1:
            return self.step()
        return self._feed(rows, ends, index)[:, -1]

    def score(self, drafts: Sequence[Sequence[int]]) -> Tensor:
        self.settle()
        for row, draft in enumerate(drafts):
            self._tokens[row] += draft
            self._total[row] += len(draft)
        self._newest = None
        return self._feed(range(self.count), self._total, every=True)

    def settle(self) -> None:
        behind = [row for row in range(self.count) if self._total[row] - self._cached[row] > 1]
        if behind:
            self._feed(behind, [total - 1 for total in self._total])

    def _feed(
        self,
        rows: Sequence[int],
        ends: Sequence[int],
        index: Tensor | None = None,
        every: bool = False,
    ) -> Tensor:
        """Feed the tokens of some rows (ascending) from their cached ones up to ``ends``.

        Returns:
            Logits ``[len(rows), 1, vocabulary]`` of the last tokens; with ``every`` those of all
            columns, rows beginning in the first.
        """
        everyone = len(rows) == self.count
        starts = self._cached
        columns = max([ends[row] - starts[row] for row in rows])
        width = max([ends[row] for row in rows])
        self._make_room(width)
        capacity, trash = self.cache.capacity, self.cache.trash
        # Rows end in the last column, so that its logits are everyone's, or begin in the first.
        # The other columns write to the trash entry.
        tokens: list[int] = []
        slots: list[int] = []
        places: list[int] = []
        fed = 0
        for row in rows:
            start, end = starts[row], ends[row]
            padding = columns - end + start
            before, after = (0, padding) if every else (padding, 0)
            tokens += [0] * before + self._tokens[row][start:end] + [0] * after
            slots += [trash] * before
            slots += range(row * capacity + start, row * capacity + end)
            slots += [trash] * after
            places += [0] * before + list(range(start, end)) + [0] * after
            fed += end - start
            starts[row] = end
        # NumPy reads lists faster than torch does.
        block = self._put(np.array((tokens, slots, places), dtype=np.int64))
        if everyone:
            index = None
        elif index is None:
            index = torch.tensor(rows, device=self.device)
        self.cache.plan = Plan(block[1], len(rows), width, index)
        position = block[2].view(-1, columns)
        mask = self._masks(position, width)
        return self._forward(block[0].view(-1, columns), position, mask, fed, every)

    def _put(self, values: np.ndarray) -> Tensor:
        """An array on the model's device."""
        return torch.from_numpy(values).to(self.device)

    def _make_room(self, width: int) -> None:
        cache = self.cache
        if width > cache.capacity:
            capacity = min(self._limit, max(width, 2 * cache.capacity))
            cache.reserve(capacity, max(self._cached))
            newest = self._newest
            self._place()
            self._newest = newest

    def _forward(
        self, tokens: Tensor, position: Tensor, mask: Any, fed: int, every: bool = False
    ) -> Tensor:
        """Logits ``[rows, columns or 1, vocabulary]`` of every column or the last."""
        extra: dict[str, Any] = {self._cache_argument: self.cache}
        if self._keep_last and tokens.shape[1] > 1 and not every:
            extra["logits_to_keep"] = 1
        start = perf_counter()
        with span(self.name):
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                return_dict=True,
                **extra,
            ).logits
        self.seconds += perf_counter() - start
        self.calls += 1
        self.rows_run += tokens.shape[0]
        self.tokens_run += fed
        return self.allowed(logits if every else logits[:, -1:])

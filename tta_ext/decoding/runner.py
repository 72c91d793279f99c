"""One model in the decoding loop: its tokens, its ragged cache, its forwards.

A row holds ``total`` tokens, of which the first ``cached`` have keys in the cache; the others are
*pending*. A forward feeds pending tokens and returns the logits after each row's last token. In the
plain case every row has one pending token (:meth:`Runner.step`). The lazy proxy's rows collect
pending tokens until their logits are wanted (:meth:`Runner.catch_up`). A prompt, except its last
token, goes through :meth:`Runner.prefill`.

Host-side copies of the lengths exist so that no forward waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.attention import MaskBuilder, check_model
from tta_ext.decoding.cache import Plan, RaggedCache
from tta_ext.decoding.profiling import span

__all__ = ["Runner"]

# Padded tokens of one prefill call at most; longer rows go alone.
PREFILL_TOKENS = 8192


class Runner:
    """A model and the rows it decodes.

    Args:
        model: a causal language model that :func:`~tta_ext.decoding.attention.check_model` accepts.
        prompts: token ids of each row, none empty.
        room: number of tokens that will be appended to a row at most.
        vocabulary: number of leading logits to return.
        masked: ids below ``vocabulary`` that must never be drawn, or None.
        name: name in profiles and messages.

    Attributes:
        total: int64 ``[rows]`` on the model's device, tokens a row holds.
        cached: int64 ``[rows]`` on the model's device, how many of them the cache holds.
        seconds, calls, rows_run, tokens_run: cost of the forwards so far.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        vocabulary: int,
        masked: Tensor | None = None,
        name: str = "model",
    ) -> None:
        check_model(model, name)
        self.model, self.name = model, name
        self.vocabulary, self.masked = vocabulary, masked
        self.device = model.get_input_embeddings().weight.device
        self._keep_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._masks = MaskBuilder(model.config.get_text_config(), model.dtype, self.device)
        self.seconds = 0.0
        self.calls = self.rows_run = self.tokens_run = 0
        self.cache: RaggedCache | None = None
        self._load(prompts, room)

    # ---- tokens ------------------------------------------------------------------------------

    def _load(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Set the rows' tokens; nothing counts as cached."""
        lengths = [len(prompt) for prompt in prompts]
        for row, length in enumerate(lengths):
            if not length:
                raise ValueError(f"prompt {row} of {self.name} has no token, expected at least one")
        self.count = len(lengths)
        self.prompt_lengths = list(lengths)
        self._total, self._cached = list(lengths), [0] * self.count
        # Rows with equal prompts share their prefill.
        first: dict[tuple[int, ...], int] = {}
        self._group = [first.setdefault(tuple(p), row) for row, p in enumerate(prompts)]
        capacity = max(lengths, default=0) + room
        tokens = torch.zeros(self.count, capacity, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = torch.tensor(prompt, dtype=torch.int64)
        self._tokens = tokens.to(self.device)
        self._back = torch.arange(-capacity, 0, device=self.device)
        self.total = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self.cached = torch.zeros_like(self.total)
        if self.cache is None or self.cache.rows != self.count:
            # Most answers end before `room` is used up: start smaller and grow.
            self.cache = RaggedCache(self.count, min(capacity, max(lengths, default=0) + 256))
        self._set_bases()

    def reload(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Replace the rows' tokens, keeping the cache where a row's old tokens are a prefix.

        Only for the number of rows that the runner was made for.
        """
        if self.cache is None or len(prompts) != self.cache.rows or self.count != self.cache.rows:
            self._load(prompts, room)
            return
        old = [self._tokens[row, :cached].tolist() for row, cached in enumerate(self._cached)]
        self._load(prompts, room)
        shared = []
        for before, prompt in zip(old, prompts, strict=True):
            limit = min(len(before), len(prompt) - 1)
            same = next((i for i in range(limit) if before[i] != prompt[i]), limit)
            shared.append(same)
        self.rewind(shared)

    def rewind(self, cached: Sequence[int]) -> None:
        """Declare that the cache holds the first ``cached[row]`` tokens of each row."""
        self._cached = list(cached)
        self.cached.copy_(torch.tensor(self._cached, dtype=torch.int64))

    def _set_bases(self) -> None:
        assert self.cache is not None
        self._bases = torch.arange(self.count, device=self.device) * self.cache.capacity

    def append(self, token: Tensor) -> None:
        """Add one token a row; int64 ``[rows]`` on the model's device."""
        self._tokens.scatter_(1, self.total[:, None], token[:, None])
        self.total.add_(1)
        self._total = [total + 1 for total in self._total]

    def tokens(self, row: int) -> list[int]:
        """All tokens of a row, prompt first."""
        return self._tokens[row, : self._total[row]].tolist()

    def keep(self, rows: list[int], index: Tensor) -> None:
        """Drop all rows but ``rows`` (ascending; ``index`` is the same as an int64 tensor)."""
        assert self.cache is not None
        index = index.to(self.device)
        if any(self._cached):
            self.cache.keep(index, max(self._cached))
        self._tokens = self._tokens.index_select(0, index)
        self.total = self.total.index_select(0, index)
        self.cached = self.cached.index_select(0, index)
        self._total = [self._total[row] for row in rows]
        self._cached = [self._cached[row] for row in rows]
        self.prompt_lengths = [self.prompt_lengths[row] for row in rows]
        new_first: dict[int, int] = {}
        self._group = [new_first.setdefault(self._group[row], i) for i, row in enumerate(rows)]
        self.count = len(rows)
        self._set_bases()

    # ---- forwards ----------------------------------------------------------------------------

    def prefill(self) -> None:
        """Cache the prompts of rows with nothing cached, all but a row's last token.

        Rows with equal prompts are run once and copied. Prompts are padded on the right and need no
        mask: under causal attention nobody sees the padding.
        """
        assert self.cache is not None
        cold = {}
        for row in range(self.count):
            length = min(self.prompt_lengths[row], self._total[row] - 1)
            if not self._cached[row] and length:
                cold[row] = length
        first: dict[int, int] = {}
        leader = {row: first.setdefault(self._group[row], row) for row in cold}
        leaders = sorted(first.values(), key=lambda row: -cold[row])
        while leaders:
            width = cold[leaders[0]]
            batch = leaders[: max(1, PREFILL_TOKENS // width)]
            del leaders[: len(batch)]
            self._prefill(batch, [cold[row] for row in batch], width)
        target = [row for row in cold if leader[row] != row]
        source = [leader[row] for row in target]
        if target:
            self.cache.copy_rows(
                torch.tensor(source, device=self.device),
                torch.tensor(target, device=self.device),
                max(cold[row] for row in target),
            )
        if cold:
            self.rewind([cold.get(row, cached) for row, cached in enumerate(self._cached)])

    def _prefill(self, rows: list[int], lengths: list[int], width: int) -> None:
        assert self.cache is not None
        self._make_room(width)
        index = torch.tensor(rows, device=self.device)
        position = torch.arange(width, device=self.device).expand(len(rows), width)
        real = position < torch.tensor(lengths, device=self.device)[:, None]
        slots = (index * self.cache.capacity)[:, None] + position
        slots = torch.where(real, slots, self.cache.trash)
        self.cache.plan = Plan(slots.view(-1), len(rows), width, fresh=True)
        self._forward(self._tokens[index, :width], position, None, sum(lengths))

    def step(self) -> Tensor:
        """Feed the one pending token of every row.

        Returns:
            Logits ``[rows, vocabulary]`` in the model's dtype.
        """
        assert self.cache is not None
        width = max(self._total)
        self._make_room(width)
        position = self.cached[:, None]
        self.cache.plan = Plan(self._bases + self.cached, self.count, width)
        tokens = self._tokens.gather(1, position)
        logits = self._forward(tokens, position, self._masks(position, width), self.count)
        self.cached.add_(1)
        self._cached = self._total.copy()
        return logits

    def catch_up(self, rows: list[int], index: Tensor) -> Tensor:
        """Feed all pending tokens of some rows, which may be many, in one call.

        Args:
            rows: which rows, ascending; each has at least one pending token.
            index: the same as an int64 tensor on the model's device.

        Returns:
            Logits ``[len(rows), vocabulary]`` after each row's last token.
        """
        assert self.cache is not None
        pending = [self._total[row] - self._cached[row] for row in rows]
        columns = max(pending)
        if columns == 1 and len(rows) == self.count:
            return self.step()
        width = max([self._total[row] for row in rows])
        self._make_room(width)
        everyone = len(rows) == self.count
        total, cached, bases = self.total, self.cached, self._bases
        if not everyone:
            total, cached = total.index_select(0, index), cached.index_select(0, index)
            bases = bases.index_select(0, index)
        if columns == 1:
            position = cached[:, None]
            slots = bases + cached
        else:
            # Rows end in the last column, so that its logits are everyone's; what is left of a
            # row's first pending token goes to the trash entry.
            position = total[:, None] + self._back[self._back.shape[0] - columns :]
            old = position < cached[:, None]
            slots = (bases[:, None] + position).masked_fill_(old, self.cache.trash).view(-1)
            position.clamp_(min=0)
        tokens = self._tokens[:, :width]
        tokens = (tokens if everyone else tokens.index_select(0, index)).gather(1, position)
        self.cache.plan = Plan(slots, len(rows), width, None if everyone else index)
        logits = self._forward(tokens, position, self._masks(position, width), sum(pending))
        self.cached.index_copy_(0, index, total)
        for row in rows:
            self._cached[row] = self._total[row]
        return logits

    def _make_room(self, width: int) -> None:
        assert self.cache is not None
        if width > self.cache.capacity:
            limit = self._tokens.shape[1]
            self.cache.reserve(min(limit, max(width, 2 * self.cache.capacity)), max(self._cached))
            self._set_bases()

    def _forward(self, tokens: Tensor, position: Tensor, mask: Any, fed: int) -> Tensor:
        extra = {"logits_to_keep": 1} if self._keep_last and tokens.shape[1] > 1 else {}
        start = perf_counter()
        with span(self.name):
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **extra,
            ).logits
        self.seconds += perf_counter() - start
        self.calls += 1
        self.rows_run += tokens.shape[0]
        self.tokens_run += fed
        logits = logits[:, -1, : self.vocabulary]
        if self.masked is not None:
            logits = logits.index_fill(1, self.masked, float("-inf"))
        return logits

"""A key/value cache whose rows may have different lengths.

transformers' caches keep one length for the whole batch. Deferral needs more: the lazy proxy runs
for the rows whose token was rejected, so its rows lag behind each other, finished rows leave the
batch, and speculative decoding rolls rows back by different amounts. So every layer here owns one
buffer ``[rows * capacity + 1, heads * head_dim]``: row ``r`` keeps position ``t`` at index
``r * capacity + t``, and the extra last entry swallows what padding columns write. A forward is
described by a :class:`Plan`: where its new keys go and which rows it reads. Rolling a row back is
nothing but writing over it, since lengths live outside (in
:class:`Runner`) and masks are built from them.

Keys lie at their own positions from 0 on, so a row's arithmetic does not depend on padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tta_ext.decoding.runtime.compat import AttentionLayerCache, query_count

__all__ = ["Plan", "RaggedCache", "RaggedLayer"]


@dataclass
class Plan:
    """What the next forward writes and reads.

    Attributes:
        slots: int64 ``[rows * columns]``, the buffer index of each new key, row-major.
        count: number of rows in the forward.
        width: number of positions to read.
        rows: int64 ``[count]``, rows to read; None for the first ``count`` rows.
        fresh: nothing is cached for these rows: attention reads the new keys themselves.
    """

    slots: Tensor
    count: int
    width: int
    rows: Tensor | None = None
    fresh: bool = False


class RaggedLayer(AttentionLayerCache):
    """Keys and values of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for states ``[rows, heads, columns, head_dim]``."""
        self.shapes = [(x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        # Under autocast the two may have different dtypes.
        self.dtypes = (key_states.dtype, value_states.dtype)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate()
        self.is_initialized = True

    def _allocate(self) -> None:
        rows, capacity = self.cache.rows, self.cache.capacity
        # Zeros, not garbage: a masked position still enters attention as 0 * value.
        self.keys, self.values = (
            torch.zeros(rows * capacity + 1, heads * size, dtype=dtype, device=self.device)
            for (heads, size), dtype in zip(self.shapes, self.dtypes, strict=True)
        )
        # [rows, capacity, heads, head_dim] of both.
        self.views = [
            buffer[:-1].view(rows, capacity, *shape)
            for buffer, shape in zip((self.keys, self.values), self.shapes, strict=True)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new states ``[n, heads, columns, head_dim]`` and return all that the plan reads.

        Returns:
            Keys and values ``[n, heads, width, head_dim]``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.cache.plan
        entries = plan.slots.shape[0]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            new = new.transpose(1, 2).reshape(entries, -1).to(buffer.dtype)
            buffer.index_copy_(0, plan.slots, new)
        if plan.fresh:
            return key_states, value_states
        if plan.rows is None:
            keys, values = (view[: plan.count, : plan.width] for view in self.views)
        else:
            keys, values = (view[:, : plan.width].index_select(0, plan.rows) for view in self.views)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return (keys.contiguous(), values.contiguous()) if self.cache.contiguous else (keys, values)

    def copy_rows(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first ``width`` positions of rows ``source`` to rows ``target``."""
        for view in self.views:
            view[:, :width].index_copy_(0, target, view[:, :width].index_select(0, source))

    def grow(self, width: int) -> None:
        """Move to buffers of the cache's present size with the first ``width`` positions."""
        old = self.views
        self._allocate()
        for before, after in zip(old, self.views, strict=True):
            after[:, :width] = before[:, :width]

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """Length and offset for masks that the model builds itself: only fresh plans ask."""
        return query_count(queries), 0

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()


class RaggedCache(Cache):
    """The cache of one model: a :class:`RaggedLayer` for each layer that asks for one.

    Args:
        rows: rows of the batch.
        capacity: positions to allocate per row; :meth:`reserve` grows it.
        contiguous: hand keys and values back as a copy without gaps, as transformers' caches do;
            few models need it.
    """

    def __init__(self, rows: int, capacity: int, contiguous: bool = False) -> None:
        self.ragged: list[RaggedLayer] = []
        super().__init__(layers=self.ragged)  # type: ignore[arg-type]
        self.rows = rows
        self.capacity = capacity
        self.contiguous = contiguous
        self.plan = Plan(torch.empty(0, dtype=torch.int64), 0, 0, fresh=True)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layers = self.ragged
        while len(layers) <= layer_idx:
            layers.append(RaggedLayer(self))
        return layers[layer_idx].update(key_states, value_states)

    @property
    def trash(self) -> int:
        """Buffer index that padding columns write to."""
        return self.rows * self.capacity

    def get_seq_length(self, layer_idx: int = 0) -> int:
        plan = self.plan
        if plan.fresh or not plan.count:
            return 0
        return plan.width - plan.slots.shape[0] // plan.count

    def get_mask_sizes(self, queries: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        return query_count(queries), 0

    def copy_rows(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first ``width`` positions between rows, in every layer."""
        for layer in self._ready():
            layer.copy_rows(source, target, width)

    def adopt(self, source: RaggedCache, rows: Tensor, width: int) -> None:
        """Copy the first ``width`` positions of rows (int64) of another cache to rows 0, 1, ..."""
        layers = self.ragged
        layers += [RaggedLayer(self) for _ in source.ragged[len(layers) :]]
        for mine, theirs in zip(layers, source.ragged, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(*(view[:1].transpose(1, 2) for view in theirs.views))
            for view, other in zip(mine.views, theirs.views, strict=True):
                view[:, :width] = other[:, :width].index_select(0, rows)

    def keep(self, rows: Tensor, width: int) -> None:
        """Copy rows (int64) to the front; positions from ``width`` on may be lost."""
        self.copy_rows(rows, torch.arange(rows.shape[0], device=rows.device), width)

    def clear(self, row: int, start: int) -> None:
        """Zero a row's positions from ``start`` on."""
        for layer in self._ready():
            for view in layer.views:
                view[row, start:] = 0

    def reserve(self, capacity: int, width: int) -> None:
        """Make room for ``capacity`` positions a row, keeping the first ``width``."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for layer in self._ready():
            layer.grow(width)

    def _ready(self) -> list[RaggedLayer]:
        return [layer for layer in self.ragged if layer.is_initialized]

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(
            buffer.numel() * buffer.element_size()
            for layer in self._ready()
            for buffer in (layer.keys, layer.values)
        )

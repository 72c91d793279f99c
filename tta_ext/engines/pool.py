"""A transformers proxy that follows the rows of an engine, for proxies that the engine cannot load.

Its keys and values lie outside the engine's own pool. A request's prompt is run when its first
token is deferred, and a row that has missed tokens is fed them in one call, as in our own loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.deferral.step import AskProxy
from tta_ext.decoding.runtime.models import logit_count
from tta_ext.decoding.runtime.runner import Runner
from tta_ext.engines.rows import Row

__all__ = ["ProxyPool"]


class ProxyPool:
    """A model and a slot for each request that it follows.

    Args:
        model: a causal language model; put into evaluation mode.
        slots: requests in flight at most.
        room: tokens of a request at most.
        vocabulary: number of leading logits to return; None: all.
    """

    def __init__(self, model: Any, slots: int, room: int, vocabulary: int | None = None) -> None:
        size = vocabulary or logit_count(model)
        self.runner = Runner(model.eval(), [[0]] * slots, room=room, vocabulary=size, name="proxy")
        self._free = list(range(slots))
        self._slots: dict[Row, int] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self._slots)} requests, {len(self._free)} free slots>"

    def forget(self, row: Row) -> None:
        """A request is gone."""
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def ask(self, rows: Sequence[Row], device: torch.device) -> AskProxy:
        """A function that gives the proxy's logits of some of these requests, on a device."""

        def logits(places: list[int] | None, index: Tensor | None) -> Tensor:
            asked = rows if places is None else [rows[place] for place in places]
            return self.logits(asked).to(device)

        return logits

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits ``[rows, vocabulary]`` after all tokens of these requests."""
        slots = []
        for row in rows:
            if row not in self._slots:
                self._slots[row] = self._free.pop()
            slots.append(self._slots[row])
            self.runner.replace(slots[-1], [*row.prompt, *row.output])
        self.runner.prefill()
        order = sorted(range(len(slots)), key=slots.__getitem__)
        found = self.runner.catch_up([slots[place] for place in order])
        back = torch.tensor(order, device=found.device).argsort()
        return found.index_select(0, back)

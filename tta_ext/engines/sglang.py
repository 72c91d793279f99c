"""Deferral in SGLang, as its custom logit processor; a transformers proxy runs in its scheduler.

Start the server with ``--enable-custom-logit-processor --disable-overlap-schedule`` and with
``TTA_EXT_SGLANG_PROXY=PATH`` in its environment. **That flag lets every client run code of its own
in the server: for trusted clients only.** A request is what :func:`request` makes::

    engine.generate(prompt, **request({"temperature": 1.0}, tta_rule="threshold", tta_param=0.4))

A request with wrong arguments stops the server's scheduler, so :func:`request` checks them first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from tta_ext.decoding.runtime.loading import load_model
from tta_ext.decoding.runtime.models import position_limit
from tta_ext.engines.pool import ProxyPool
from tta_ext.engines.rows import Asked, Row, RowTable

__all__ = ["KnapsackDeferral", "request"]

# Requests whose proxy caches are kept; those beyond are run anew when their turn comes.
SLOTS = int(os.environ.get("TTA_EXT_SGLANG_SLOTS", "64"))
# What SGLang's sampler does after our draw, and the values at which it does nothing.
_UNUSED = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "n": 1}


class _Live:
    """The requests that were seen last, and the proxy that follows them."""

    def __init__(self) -> None:
        path = os.environ.get("TTA_EXT_SGLANG_PROXY")
        if not path:
            raise ValueError("there is no proxy; set TTA_EXT_SGLANG_PROXY to its folder")
        proxy = load_model(path)
        self.pool = ProxyPool(proxy, SLOTS, position_limit(proxy) or 1 << 20)
        self.rows: dict[str, Row] = {}

    def of(self, params: Mapping[str, Any]) -> Row:
        """A request's row, which becomes the newest."""
        engine = params["__req__"]
        row = self.rows.pop(engine.rid, None)
        if row is None:
            sampling = engine.sampling_params
            # Greedy requests arrive as top-k of 1.
            temperature = 0.0 if sampling.top_k == 1 else sampling.temperature
            asked = Asked.parse(params, temperature=temperature)
            if asked is None:
                raise ValueError("custom_params has no tta_rule, expected what request() makes")
            row = Row(asked, list(engine.origin_input_ids), [])
        row.output = list(engine.output_ids)
        self.rows[engine.rid] = row
        while len(self.rows) > SLOTS:  # SGLang does not say which requests have ended
            self.pool.forget(self.rows.pop(next(iter(self.rows))))
        return row


_live = cache(_Live)


class KnapsackDeferral(CustomLogitProcessor):
    """Draws the tokens of the requests that name it."""

    def __repr__(self) -> str:
        return f"{__name__}.{type(self).__name__}()"

    def __call__(
        self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        asked = custom_param_list or ()
        if len(asked) > SLOTS:
            raise ValueError(
                f"there are {len(asked)} requests, expected at most TTA_EXT_SGLANG_SLOTS={SLOTS}"
            )
        live = _live()
        rows = [live.of(params) for params in asked]
        table = RowTable()
        for number, row in enumerate(rows):
            table.put(number, row)
        table.draw(logits, lambda one: live.pool.ask([rows[i] for i in one.rows], logits.device))
        return logits


def request(sampling_params: Mapping[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """What SGLang's ``generate`` takes for one request with a rule.

    Args:
        sampling_params: SGLang's.
        arguments: :data:`tta_ext.engines.rows.ARGUMENTS`.

    Raises:
        TypeError, ValueError: one sentence that names the argument.
    """
    sampling = dict(sampling_params or {})
    for name, unused in _UNUSED.items():
        if sampling.get(name, unused) != unused:
            raise ValueError(
                f"{name} is {sampling[name]!r}, expected {unused}: a request with tta_rule does "
                "not use it"
            )
    Asked.parse(arguments, temperature=sampling.get("temperature", 1.0))
    return {
        "sampling_params": sampling | {"custom_params": arguments},
        "custom_logit_processor": KnapsackDeferral.to_str(),
    }

"""Deferral in vLLM's first model runner, as its logits processor.

``LLM(PAIR, logits_processors=["tta_ext.engines.vllm.processor_v1:KnapsackDeferral"])``, where PAIR
is what ``tta vllm-pair`` wrote. For proxies that vLLM cannot load, PAIR may be the base alone and
``additional_config={"tta_proxy": PATH}`` names a proxy that transformers runs in the worker.

Requests say what they want (:data:`tta_ext.engines.rows.ARGUMENTS`) in ``extra_args``, over HTTP in
``vllm_xargs``; others are not touched. With ``logprobs_mode="processed_logits"`` the drawn token's
"logprob" says where it came from (:func:`tta_ext.engines.rows.source`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from tta_ext.decoding.deferral.step import AskProxy
from tta_ext.engines.rows import Group, Row, RowTable
from tta_ext.engines.vllm.arguments import PROCESSED, parse
from tta_ext.engines.vllm.plugin import ARCHITECTURE
from tta_ext.engines.vllm.stash import stash

__all__ = ["KnapsackDeferral"]


class KnapsackDeferral(LogitsProcessor):
    """Draws the tokens of the requests that ask for a rule."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        parse(sampling_params)

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool = False
    ) -> None:
        model = vllm_config.model_config
        self.told = model.logprobs_mode == PROCESSED
        self.pool = None
        if ARCHITECTURE not in (model.hf_config.architectures or ()):
            self.pool = _pool(vllm_config, device)
        self.table = RowTable(self.pool.forget) if self.pool is not None else RowTable()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for number in batch_update.removed:
            self.table.drop(number)
        for number, params, prompt, output in batch_update.added:
            asked = parse(params, told=self.told)
            row = None if asked is None else Row(asked, prompt or [], output)
            self.table.put(number, row)
        for origin, target, direction in batch_update.moved:
            self.table.move(origin, target, direction is MoveDirectionality.SWAP)

    def apply(self, logits: Tensor) -> Tensor:
        rows, device = len(logits), logits.device

        def proxy(group: Group) -> Tensor | AskProxy:
            if self.pool is None:
                return stash.of(rows, group)
            return self.pool.ask([self.table[number] for number in group.rows], device)

        self.table.draw(logits, proxy)
        return logits


def _pool(vllm_config: VllmConfig, device: torch.device) -> Any:
    """The proxy that the worker owns."""
    from tta_ext.decoding.runtime.loading import load_model
    from tta_ext.engines.pool import ProxyPool

    given: Any = vllm_config.additional_config
    path = given.get("tta_proxy") if isinstance(given, dict) else None
    if not path:
        raise ValueError(
            "there is no proxy; serve a folder that tta vllm-pair wrote, or name one in "
            'additional_config={"tta_proxy": PATH}'
        )
    if vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            "a proxy of its own needs each token before the next; pass async_scheduling=False"
        )
    model = vllm_config.model_config
    proxy = load_model(path, dtype=model.dtype, device=device)
    slots = vllm_config.scheduler_config.max_num_seqs
    return ProxyPool(proxy, slots, model.max_model_len, model.get_vocab_size())

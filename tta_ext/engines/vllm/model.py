"""Base and proxy as one model of vLLM, so that both have its paged cache, chunked prefill,
preemption, prefix caching and tensor parallelism.

Its hidden states are both models' side by side; its logits are the base's, and what the proxy says
of the same rows is kept for whoever draws (:data:`stash`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from tta_ext.engines.vllm.stash import stash

__all__ = ["TTAKadForCausalLM"]

_PROXY = "tta_proxy."


class TTAKadForCausalLM(nn.Module):
    """A folder that ``tta vllm-pair`` wrote, as vLLM builds it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("a pair of models has no pipeline parallelism; use tensor parallelism")

        def build(folder: str, name: str) -> Any:
            return init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, name),
                hf_config=AutoConfig.from_pretrained(folder, trust_remote_code=False),
            )

        self.base = build(config.tta_base, "base")
        self.proxy = build(config.tta_proxy, "proxy")
        self.width = self.base.config.get_text_config().hidden_size
        self.size, self.masked = config.tta_vocabulary
        # The base's weights are those of the folder; these come after them.
        self.secondary_weights = [
            DefaultModelLoader.Source(config.tta_proxy, revision=None, prefix=_PROXY)
        ]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings, which nothing here uses; vLLM asks a text model to have them."""
        return self.base.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Both models' pre-logits ``[tokens, d + d_proxy]``."""
        both = [model(input_ids, positions, None, None) for model in (self.base, self.proxy)]
        return torch.cat(both, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The base's logits ``[rows, V]``; the proxy's lie in the stash."""
        width = self.width
        logits = self.base.compute_logits(hidden_states[:, :width].contiguous())
        other = self.proxy.compute_logits(hidden_states[:, width:].contiguous())
        if logits is None or other is None:  # a rank that gathers nothing
            return None
        stash.logits = self._restricted(other, logits.shape[1])
        return self._restricted(logits, logits.shape[1])

    def _restricted(self, logits: Tensor, columns: int) -> Tensor:
        """Logits of the ids that are tokens of both models."""
        if logits.shape[1] != columns:
            cut = logits.new_full((len(logits), columns), -torch.inf)
            cut[:, : self.size] = logits[:, : self.size]
            logits = cut
        logits[:, self.size :] = -torch.inf
        if self.masked:
            logits[:, self.masked] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Give each model its own, the base's first as they come; names as vLLM checks them."""
        found: set[str] = set()
        for proxys, pairs in groupby(weights, key=lambda one: one[0].startswith(_PROXY)):
            model, start = (self.proxy, "proxy.") if proxys else (self.base, "base.")
            own = ((name.removeprefix(_PROXY), tensor) for name, tensor in pairs)
            found |= {start + name for name in model.load_weights(own)}
        return found

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """What vLLM's second model runner asks for."""
        from tta_ext.engines.vllm.sampler_v2 import model_state

        return model_state()

"""Deferral in vLLM's second model runner, speculation included. **Not yet run on a GPU**: that
runner needs Triton kernels; here its contract alone is tested.

The runner lets a model wrap its samplers. Ours draws the token of every position whose request
asked for a rule, drafts' positions too, and leaves each such row of the logits no other choice;
then the runner's own sampler runs, or its verification. Against a target that is certain, rejection
sampling is exact coupling: a draft stands if it is the token that the plain loop draws there, and
the first one that is not is replaced by it. So speculation changes no token, and no draft logits
are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tta_ext.engines.rows import Asked, draw, group
from tta_ext.engines.vllm.arguments import PROCESSED, parse
from tta_ext.engines.vllm.stash import stash

__all__ = ["DrawnFirst", "RequestArguments", "custom_sampler", "model_state"]


class RequestArguments(LogitsProcessor):
    """Checks requests' arguments when they arrive, so that a wrong one is an HTTP 400.

    ``LLM(PAIR, logits_processors=["tta_ext.engines.vllm.sampler_v2:RequestArguments"])``.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        parse(sampling_params, late=True)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        return logits


class DrawnFirst:
    """A sampler of vLLM's, or its verification, behind our draw.

    Args:
        inner: what is called with the logits afterwards; all other attributes are its.
        asked: the requests' arguments by their place in the runner's state, shared by both.
        told: the server returns processed logits.
    """

    def __init__(self, inner: Any, asked: dict[int, Asked], told: bool) -> None:
        self.inner, self.asked, self.told = inner, asked, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """A request has taken a place."""
        self.inner.add_request(req_idx, sampling_params)
        one = parse(sampling_params, told=self.told, late=True)
        self.asked.pop(req_idx, None)
        if one is not None:
            self.asked[req_idx] = one

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any) -> Any:
        rows = np.diff(input_batch.cu_num_logits_np)
        places = np.repeat(input_batch.idx_mapping_np, rows)
        found = {i: self.asked[p] for i, p in enumerate(places.tolist()) if p in self.asked}
        if found:
            # The token to draw stands after the one that was fed.
            position = input_batch.positions[input_batch.logits_indices] + 1
            groups = group(found, logits.device)
            draw(logits, groups, position, lambda one: stash.of(len(logits), one))
        return self.inner(logits, input_batch, *args)


def custom_sampler(sampler: Any, verification: Any | None, told: bool) -> tuple[Any, Any | None]:
    """The pair that the runner takes in place of its own."""
    asked: dict[int, Asked] = {}
    both = [
        None if one is None else DrawnFirst(one, asked, told) for one in (sampler, verification)
    ]
    return both[0], both[1]


def model_state() -> type[Any]:
    """The runner's state of a pair of models."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    class PairState(DefaultModelState):
        def custom_sampler(self, sampler: Any) -> tuple[Any, Any | None]:
            speculative = self.vllm_config.speculative_config
            verification = None
            if speculative is not None:
                verification = RejectionSampler(sampler, speculative, self.device)
            told = self.model_config.logprobs_mode == PROCESSED
            return custom_sampler(sampler, verification, told)

    return PairState

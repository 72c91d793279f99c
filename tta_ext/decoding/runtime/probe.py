"""Does a model compute the same when rows of different length share a batch? One short trial."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tta_ext.decoding.runtime.models import embedding_count, logit_count
from tta_ext.decoding.runtime.runner import Runner

__all__ = ["probe_model"]

_probed: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def probe_model(model: Any, role: str) -> None:
    """Refuse a model that computes something else when rows of different length share a batch.

    Some models build masks or position biases of their own and ignore the ones they are given. Two
    short rows, once together from the ragged cache and once alone without a cache, find that out;
    the answer is remembered.

    Raises:
        ValueError: the logits differ by more than rounding explains.
    """
    if model not in _probed:
        ids = [1 + i % (embedding_count(model) - 1) for i in range(6)]
        rows = [ids, ids[3:5]]
        runner = Runner(model, rows, room=1, vocabulary=logit_count(model), name=role)
        runner.prefill()
        together = runner.step().double()
        worst = 0.0
        for row, tokens in enumerate(rows):
            alone = model(input_ids=torch.tensor([tokens], device=runner.device), use_cache=False)
            alone = alone.logits[0, -1].double()
            scale = float(alone.abs().max().clamp_min(1e-6))
            worst = max(worst, float((together[row] - alone).abs().max()) / scale)
        _probed[model] = worst
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not _probed[model] <= limit:
        raise ValueError(
            f"{role} ({type(model).__name__}) gives other logits when rows of different length "
            f"share a batch (by {_probed[model]:.1%} of the largest), so it cannot be used here"
        )

"""Weighted sums of log-probabilities of several models: scores first, then the kernels of a row."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments, inverse_temperature
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton import rule as resolution
from tta_ext.backends.triton.launch import jit, launch, operator
from tta_ext.backends.triton.rows import Rows, Softmax, logits, tile


@jit
def score_tiles(base, expert, anti, beta, experts, out, found):
    """base + sum_e beta_e (expert_e - anti_e), an fma a term; NaN where that has no meaning.

    Of a pair it is noted as well whether either has a token in this tile.
    """
    row, j, x = tile(base)
    score = x
    for e in range(experts):
        weight = tl.load(beta + e)
        difference = logits(expert, e * expert.inner + row, j)
        usable = difference < num.INFINITY
        if anti is not None:
            y = logits(anti, e * anti.inner + row, j)
            usable = usable & (y < num.INFINITY)
            at = e * tl.num_programs(0) + tl.program_id(0)
            tl.store(found[0] + at, tl.max(difference, 0) > -num.INFINITY)
            tl.store(found[1] + at, tl.max(y, 0) > -num.INFINITY)
            both = (difference == -num.INFINITY) & (y == -num.INFINITY)
            difference = tl.where(both, 0.0, difference - y)
        ruled_out = (x == -num.INFINITY) & (score == -num.INFINITY)
        term = tl.where(ruled_out, -num.INFINITY, tl.fma(difference, weight, score))
        term = tl.where(usable, term, num.NAN)
        score = tl.where(weight == 0.0, score, term)
    tl.store(out + row * base.vocab + j, score, mask=j < base.vocab)


def _scores(base_logits: Tensor, expert: Tensor, anti: Tensor | None, beta: Tensor) -> Tensor:
    """The combined scores, float32 ``[B, V]``."""
    batch, vocab = base_logits.shape
    x = Rows.of(base_logits.new_empty(batch, vocab, dtype=torch.float32))
    other = None if anti is None else Rows.of(anti, batch)
    beta = beta.to(x.data.device).contiguous()
    found = x.data.new_empty(2, beta.numel(), batch, x.tiles, dtype=torch.bool)
    launch(score_tiles, x.programs, Rows.of(base_logits), Rows.of(expert, batch), other,
           beta, beta.numel(), x.data, found.unbind(), num_warps=16)  # fmt: skip
    if anti is not None:  # where both rule all out their pair says nothing, and hides it
        empty = ~found.any(-1).all(0)
        x.data.masked_fill_((empty & (beta != 0.0)[:, None]).any(0)[:, None], torch.nan)
    return x.data


@operator
def implicit_reward_probs(base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None,
                          beta: Tensor, temperature: float, *, out: Tensor) -> None:  # fmt: skip
    """The policy of a rule that defers nothing."""
    scores = _scores(base_logits, expert_logits, anti_logits, beta)
    no = RuleArguments(torch.zeros(1, dtype=torch.float64), rules.THRESHOLD, rules.EXCLUDE,
                       temperature, temperature)  # fmt: skip
    resolution.ask(resolution.resolved(scores, None, no), no, pi=out)


@operator
def implicit_reward_sample(base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None,
                           beta: Tensor, temperature: float, key: KeyArguments, *,
                           out: Tensor) -> None:  # fmt: skip
    scores = Rows.of(_scores(base_logits, expert_logits, anti_logits, beta))
    s = Softmax.of(scores, inverse_temperature(temperature))
    rows.sample(s, rows.key_of(key), rng.BASE, out)

"""Weighted sums of log-probabilities of several models: scores first, then the kernels of a row."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.reference._common import KeyArguments, inverse_temperature
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import jit, launch, operator, scratch
from tta_ext.backends.triton.rows import Rows, Softmax, logits, probability, tile


@jit
def score_tiles(base, expert, anti, beta, experts, out):
    """base + sum_e beta_e (expert_e - anti_e), an fma a term; NaN where that has no meaning."""
    row, j, x = tile(base)
    score = x
    for e in range(experts):
        weight = tl.load(beta + e)
        difference = logits(expert, e * expert.inner + row, j)
        usable = difference < num.INFINITY
        if anti is not None:
            y = logits(anti, e * anti.inner + row, j)
            usable = usable & (y < num.INFINITY)
            both = (difference == -num.INFINITY) & (y == -num.INFINITY)
            difference = tl.where(both, 0.0, difference - y)
        ruled_out = (x == -num.INFINITY) & (score == -num.INFINITY)
        term = tl.where(ruled_out, -num.INFINITY, tl.fma(difference, weight, score))
        term = tl.where(usable, term, num.NAN)
        score = tl.where(weight == 0.0, score, term)
    tl.store(out + row * base.vocab + j, score, mask=j < base.vocab)


@jit
def sum_rows(s):
    rows.total(s, None, tl.program_id(0).to(tl.int64))


@jit
def prob_tiles(s, out):
    row, j, x = tile(s.x)
    z = tl.load(s.z + row)
    p = tl.where(z == z, probability(s, row, x), num.NAN)
    tl.store(out + row * s.x.vocab + j, p, mask=j < s.x.vocab)


def _scores(base_logits: Tensor, expert: Tensor, anti: Tensor | None, beta: Tensor,
            temperature: float) -> Softmax:  # fmt: skip
    """The combined scores, float32 ``[B, V]``."""
    batch, vocab = base_logits.shape
    x = Rows.of(scratch(base_logits, batch, vocab, dtype=torch.float32))
    other = None if anti is None else Rows.of(anti, batch)
    beta = beta.to(x.data.device).contiguous()
    launch(score_tiles, x.programs, Rows.of(base_logits), Rows.of(expert, batch), other,
           beta, beta.numel(), x.data, num_warps=8)  # fmt: skip
    if anti is not None:  # where both rule all out their pair says nothing, and hides it
        empty = torch.minimum(expert.amax(-1), anti.amax(-1)) == -torch.inf
        x.data.masked_fill_((empty & (beta != 0.0)[:, None]).any(0)[:, None], torch.nan)
    return Softmax.of(x, inverse_temperature(temperature))


@operator
def implicit_reward_probs(
    base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None, beta: Tensor,
    temperature: float, check: bool, *, out: Tensor,
) -> None:  # fmt: skip
    s = _scores(base_logits, expert_logits, anti_logits, beta, temperature)
    launch(sum_rows, s.x.rows, s)
    launch(prob_tiles, s.x.programs, s, out, num_warps=8)


@operator
def implicit_reward_sample(
    base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None, beta: Tensor,
    temperature: float, key: KeyArguments, check: bool, *, out: Tensor,
) -> None:  # fmt: skip
    s = _scores(base_logits, expert_logits, anti_logits, beta, temperature)
    rows.sample(s, rows.key_of(key), rng.BASE, out)

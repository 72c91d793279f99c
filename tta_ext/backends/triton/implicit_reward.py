"""Weighted sums of log-probabilities of several models: scores first, then the kernels of a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.reference._common import KeyArguments, inverse_temperature
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import Rows, jit, launch, operator, scratch
from tta_ext.backends.triton.numerics import INFINITY
from tta_ext.backends.triton.policy import block_of, blocks_of


@jit
def score_tiles(base, expert, anti, beta, experts, out):
    """base + sum_e beta_e (expert_e - anti_e), an fma a term; NaN where that has no meaning."""
    row, j, x = block_of(base)
    score = x
    for e in range(experts):
        weight = tl.load(beta + e)
        difference = rows.logits(expert, e * expert.inner + row, j)
        usable = difference < INFINITY
        if anti is not None:
            y = rows.logits(anti, e * anti.inner + row, j)
            usable = usable & (y < INFINITY)
            both = (difference == -INFINITY) & (y == -INFINITY)
            difference = tl.where(both, 0.0, difference - y)
        ruled_out = (x == -INFINITY) & (score == -INFINITY)
        term = tl.where(ruled_out, -INFINITY, tl.fma(difference, weight, score))
        term = tl.where(usable, term, float("nan"))
        score = tl.where(weight == 0.0, score, term)
    tl.store(out + row * base.vocab + j, score, mask=j < base.vocab)


@jit
def prob_tiles(x, s, inverse, out):
    row, j, y = block_of(x)
    tiles = rows.tiles_of(x.vocab)
    top = rows.row_max(s.tile_max, row, tiles)
    z = rows.row_sum(s.tile_max, s.tile_sum, row, tiles, top, inverse)
    p = tl.where(z == z, rows.probability(y, top, inverse, z), float("nan"))
    tl.store(out + row * x.vocab + j, p, mask=j < x.vocab)


def _scores(base_logits: Tensor, expert: Tensor, anti: Tensor | None, beta: Tensor) -> Rows:
    """The combined scores, float32 ``[B, V]``."""
    batch, vocab = base_logits.shape
    base, x = Rows.of(base_logits), Rows.of(scratch(base_logits, batch, vocab, dtype=torch.float32))
    other = None if anti is None else Rows.of(anti, batch)
    launch(score_tiles, batch * blocks_of(x), base, Rows.of(expert, batch), other,
           beta.to(x.data.device).contiguous(), beta.numel(), x.data)  # fmt: skip
    return x


@operator
def implicit_reward_probs(
    base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None, beta: Tensor,
    temperature: float, check: bool, *, out: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    x = _scores(base_logits, expert_logits, anti_logits, beta)
    inverse = inverse_temperature(temperature)
    launch(prob_tiles, x.rows * blocks_of(x), x, rows.stats(x, inverse), inverse, out)
    return lambda: torch.isnan(out[:, 0])


@operator
def implicit_reward_sample(
    base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None, beta: Tensor,
    temperature: float, key: KeyArguments, check: bool, *, out: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    x = _scores(base_logits, expert_logits, anti_logits, beta)
    inverse = inverse_temperature(temperature)
    rows.sample(x, rows.stats(x, inverse), inverse, rows.Key.of(key), rng.BASE, out)
    return lambda: out < 0

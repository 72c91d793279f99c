"""Weighted sums of log-probabilities of several models: scores first, then the kernels of a row."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends import reference
from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton.launch import Rows, complain, factor, jit, launch, scratch
from tta_ext.backends.triton.numerics import INFINITY
from tta_ext.backends.triton.rows import (
    Key,
    Stats,
    probability,
    row_max,
    row_sum,
    sample,
    stats,
    tiles_of,
)

_BLOCK = 1024


@jit
def score_tiles(base, base_stride, expert, expert_stride, expert_row, anti, anti_stride, anti_row,
                beta, experts, vocab, out, BLOCK: tl.constexpr):  # fmt: skip
    """base + sum_e beta_e (expert_e - anti_e), an fma a term; NaN where that has no meaning."""
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = j < vocab
    x = tl.load(base + row * base_stride + j, mask=inside, other=0.0).to(tl.float32)
    score = x
    for e in range(experts):
        weight = tl.load(beta + e)
        at = expert + e * expert_stride.to(tl.int64) + row * expert_row
        difference = tl.load(at + j, mask=inside, other=0.0).to(tl.float32)
        usable = difference < INFINITY
        if anti is not None:
            at = anti + e * anti_stride.to(tl.int64) + row * anti_row
            y = tl.load(at + j, mask=inside, other=0.0).to(tl.float32)
            usable = usable & (y < INFINITY)
            both = (difference == -INFINITY) & (y == -INFINITY)
            difference = tl.where(both, 0.0, difference - y)
        ruled_out = (x == -INFINITY) & (score == -INFINITY)
        term = tl.where(ruled_out, -INFINITY, tl.fma(difference, weight, score))
        term = tl.where(usable, term, float("nan"))
        score = tl.where(weight == 0.0, score, term)
    tl.store(out + row * vocab + j, score, mask=inside)


@jit
def prob_tiles(score, vocab, tile_max, tile_sum, inverse, out, BLOCK: tl.constexpr):
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    tiles = tiles_of(vocab)
    top = row_max(tile_max, row, tiles)
    z = row_sum(tile_max, tile_sum, row, tiles, top, inverse)
    x = tl.load(score + row * vocab + j, mask=j < vocab, other=-INFINITY)
    p = tl.where(z == z, probability(x, top, inverse, z), float("nan"))
    tl.store(out + row * vocab + j, p, mask=j < vocab)


def _scores(base: Tensor, expert: Tensor, anti: Tensor | None, beta: Tensor,
            inverse: float) -> tuple[Rows, Stats]:  # fmt: skip
    """The combined scores, float32 ``[B, V]``, and their statistics."""
    batch, vocab = base.shape
    score = scratch(base, batch, vocab, dtype=torch.float32)
    other = (anti, anti.stride(0), anti.stride(1)) if anti is not None else (None, 0, 0)
    launch(
        score_tiles, batch * -(-vocab // _BLOCK), base, base, base.stride(0), expert,
        expert.stride(0), expert.stride(1), *other, beta.to(base.device).contiguous(),
        beta.numel(), vocab, score, BLOCK=_BLOCK,
    )  # fmt: skip
    x = Rows.of(score)
    return x, stats(x, inverse)


def implicit_reward_probs(base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None,
                          beta: Tensor, temperature: float, check: bool, *,
                          out: Tensor) -> None:  # fmt: skip
    inverse = factor(temperature)
    x, s = _scores(base_logits, expert_logits, anti_logits, beta, inverse)
    launch(prob_tiles, x.rows * -(-x.vocab // _BLOCK), out, x.data, x.vocab, s.tile_max, s.tile_sum,
           inverse, out, BLOCK=_BLOCK)  # fmt: skip
    given = base_logits, expert_logits, anti_logits, beta, temperature, check
    complain(check, torch.isnan(out[:, 0]), lambda: reference.implicit_reward_probs(*given))


def implicit_reward_sample(base_logits: Tensor, expert_logits: Tensor, anti_logits: Tensor | None,
                           beta: Tensor, temperature: float, *rest: Any,
                           out: Tensor) -> None:  # fmt: skip
    arguments, check = KeyArguments(*rest[:6]), rest[6]
    arguments.check(check)
    inverse = factor(temperature)
    x, s = _scores(base_logits, expert_logits, anti_logits, beta, inverse)
    sample(x, s, inverse, Key.of(*rest[:5]), arguments.do_sample, rng.BASE, 0, out)
    given = base_logits, expert_logits, anti_logits, beta, temperature, *rest
    complain(check, out < 0, lambda: reference.implicit_reward_sample(*given))

"""Rows of logits, what kernels learn about them, and what that makes of a token.

Kernels run one after another and each adds to these records; what a token's probability, verdict
or share in a law is follows from them alone, in any kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import scratch


class Rows(NamedTuple):
    """Logits ``[B, V]`` or ``[B, K, V]``.

    Row r is (r // inner, r % inner); of its ``inner`` positions only ``limit`` may exist.
    """

    data: Tensor
    outer_stride: int
    inner_stride: int
    inner: int
    limit: int
    vocab: int

    @classmethod
    def of(cls, logits: Tensor, positions: int = 1) -> Rows:
        if logits.dim() == 2:
            return cls(logits, logits.stride(0), 0, 1, 1, logits.shape[1])
        return cls(logits, logits.stride(0), logits.stride(1), positions, *logits.shape[1:])

    @property
    def rows(self) -> int:
        return self.data.shape[0] * self.inner

    @property
    def tiles(self) -> int:
        """Of a row."""
        return -(-self.vocab // num.TILE.value)

    @property
    def work(self) -> int:
        """Bytes, about: tiles to the next power of two. What block sizes are tuned for."""
        tiles = triton.next_power_of_2(max(self.rows * self.tiles, 1))
        return int(tiles * self.data.element_size())

    def blocks(self, sizes: dict[str, Any]) -> int:
        """Programs that take ``T`` tiles each."""
        return self.rows * -(-self.tiles // int(sizes["T"]))


class Softmax(NamedTuple):
    """Rows at a temperature, with canonical statistics, of tiles ``[rows, tiles]`` and of rows."""

    x: Rows
    inverse: float  # 1/T
    tile_top: Tensor  # float32
    tile_sum: Tensor  # float32, relative to the tile's maximum; NaN where a logit is NaN or +inf
    top: Tensor  # float32
    z: Tensor  # float64; NaN for a row that has no law

    @classmethod
    def of(cls, x: Rows, inverse: float) -> Softmax:
        tiles = (scratch(x.data, x.rows, x.tiles, dtype=torch.float32) for _ in range(2))
        top = scratch(x.data, x.rows, dtype=torch.float32)
        return cls(x, inverse, *tiles, top, scratch(x.data, x.rows))


class State(NamedTuple):
    """What a rule makes of each row, ``[rows]``."""

    limit: Tensor  # float64: the probability that decides, or the knapsack's capacity in weights
    fraction: Tensor  # of the critical item that is deferred
    mass: Tensor  # deferred, and kept
    kept: Tensor
    cut: Tensor  # int64: the knapsack defers what is ordered before it
    critical: Tensor  # -1: none
    valid: Tensor  # bool; not where a row that was read has no law, or the parameter is none

    @classmethod
    def of(cls, x: Rows) -> State:
        kinds = [torch.float64] * 4 + [torch.int64] * 2 + [torch.bool]
        return cls(*(scratch(x.data, x.rows, dtype=kind) for kind in kinds))


class Law(NamedTuple):
    """Two models' rows, at the temperature of sampling and of the rule, and the rule's state."""

    p: Softmax
    q: Softmax | None
    rule_p: Softmax
    rule_q: Softmax | None
    state: State


@triton.jit
def tiles_of(vocab):
    return tl.cdiv(vocab, num.TILE)


@triton.jit
def logits(x, row, j):
    """Logits j of a row as float32: -inf beyond its end, and in a row that does not exist."""
    first = x.data + (row // x.inner) * x.outer_stride + (row % x.inner) * x.inner_stride
    end = tl.where(row % x.inner < x.limit, x.vocab, 0)
    return tl.load(first + j, mask=j < end, other=-num.INFINITY).to(tl.float32)


@triton.jit
def tile(x):
    """For a program a tile: its row, the tokens of the tile, and their logits."""
    row, t = (tl.program_id(0) // tiles_of(x.vocab)).to(tl.int64), tl.program_id(0)
    j = t % tiles_of(x.vocab) * num.TILE + tl.arange(0, num.TILE)
    return row, j, logits(x, row, j)


@triton.jit
def probability(s, row, x):
    """fl32(exp(x - m) / Z), of one logit or many."""
    weight = num.exp((x - tl.load(s.top + row)) * s.inverse)
    return (weight.to(tl.float64) / tl.load(s.z + row)).to(tl.float32)


@triton.jit
def deferred(law, row, j, x, RULE: tl.constexpr):
    """A rule's verdict on tokens j, whose logits are x: whether it defers them whole."""
    limit = tl.load(law.state.limit + row)
    if RULE == rules.KNAPSACK:
        verdict = num.order(x, j) < tl.load(law.state.cut + row)
    elif RULE == rules.PROXY_ABOVE:
        q = probability(law.rule_q, row, logits(law.rule_q.x, row, j))
        verdict = q.to(tl.float64) > limit
    elif RULE == rules.PROXY_BELOW:
        q = probability(law.rule_q, row, logits(law.rule_q.x, row, j))
        verdict = q.to(tl.float64) < limit
    else:
        verdict = probability(law.rule_p, row, x).to(tl.float64) < limit
    return verdict


@triton.jit
def mu(law, row, j, x, RULE: tl.constexpr):
    """How much of tokens j a rule defers, float64: all, or the critical item's share."""
    share = tl.where(j == tl.load(law.state.critical + row), tl.load(law.state.fraction + row), 0.0)
    return tl.where(deferred(law, row, j, x, RULE), 1.0, share)


@triton.jit
def parts(law, row, j, RULE: tl.constexpr):
    """(1 - mu) p and q of tokens j, float64; p and q are rounded to float32 before."""
    x = logits(law.p.x, row, j)
    p = probability(law.p, row, x).to(tl.float64)
    q = probability(law.q, row, logits(law.q.x, row, j)).to(tl.float64)
    return (1.0 - mu(law, row, j, x, RULE)) * p, q


@triton.jit
def policy(law, row, j, RULE: tl.constexpr):
    """pi(v) = (1 - mu(v)) p(v) + q(v) D, the sum in float64, rounded once."""
    kept, q = parts(law, row, j, RULE)
    return (kept + q * tl.load(law.state.mass + row)).to(tl.float32)


@triton.jit
def residual(law, row, j, RULE: tl.constexpr):
    """max((1 - mu) p - (1 - D) q, 0), rounded once: what a rejected draft leaves to draw from."""
    kept, q = parts(law, row, j, RULE)
    w = (kept - tl.load(law.state.kept + row) * q).to(tl.float32)
    return tl.where(w > 0.0, w, 0.0)

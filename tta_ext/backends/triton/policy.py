"""The law pi over whole rows: masses, pi itself, what is most probable.

What mask, policy, statistics, greedy choices and verification share, once a rule is resolved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext.backends.triton import law as laws
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.cut import canonical_weight, mass_sum
from tta_ext.backends.triton.launch import jit, launch, scratch, tuned
from tta_ext.backends.triton.law import Law, Softmax, logits, tiles_of


@tuned((4, 4), (1, 1), (1, 4), (2, 4), (8, 8))
def masked_sums(law, s, sums, work, RULE: tl.constexpr, T: tl.constexpr):
    """The mass of what the rule defers in a tile, and of what it keeps, scaled to the row."""
    row, at, there, first = rows.place(s.x, T)
    top = tl.load(s.tile_top + at, mask=there, other=-num.INFINITY)
    one = tl.zeros((T, num.LANES), tl.float32)
    two = one
    for g in range(rows.groups_of(s.x.vocab)):
        j = first + g * num.LANES
        x = logits(s.x, row, j)
        weight = rows.relative(x, top[:, None], s.inverse)
        deferred = laws.deferred(law, row, j, x, RULE)
        one = one + tl.where(deferred, weight, 0.0)
        two = two + tl.where(deferred, 0.0, weight)
    scale = num.exp((top - tl.load(s.top + row)) * s.inverse).to(tl.float64)
    tl.store(sums[0] + at, num.fold(one, T).to(tl.float64) * scale, mask=there)
    tl.store(sums[1] + at, num.fold(two, T).to(tl.float64) * scale, mask=there)


@jit
def mass_rows(law, s, sums):
    """The deferred and the kept mass of each row, into its state."""
    row = tl.program_id(0).to(tl.int64)
    state, tiles, z = law.state, tiles_of(s.x.vocab), tl.load(s.z + row)
    fraction, item = tl.load(state.fraction + row), tl.load(state.critical + row)
    share = fraction * canonical_weight(s, row, item, logits(s.x, row, tl.maximum(item, 0)))
    one, two = (
        tl.sum(mass_sum(sums[0], row, tiles, 1), 0),
        tl.sum(mass_sum(sums[1], row, tiles, 1), 0),
    )
    one = tl.where(fraction > 0.0, one + share, one) / z
    tl.store(state.mass + row, tl.where(tl.load(state.valid + row), one, num.NAN))
    tl.store(state.kept + row, tl.where(fraction > 0.0, two - share, two) / z)


def sum_up(law: Law, rule: int, s: Softmax | None = None) -> Tensor:
    """The deferred and the kept mass, at the temperature of sampling or of ``s``; the first."""
    s, x = s or law.p, law.p.x
    sums = tuple(scratch(x.data, x.rows, x.tiles) for _ in range(2))
    launch(masked_sums, x.blocks, law, s, sums, x.work, RULE=rule)
    launch(mass_rows, x.rows, law, s, sums)
    return law.state.mass


@jit
def policy_tiles(law, out, best, RULE: tl.constexpr):
    """pi, written out or, where ``best`` is given, the largest of each tile."""
    row, j, _ = laws.tile(law.p.x)
    pi = laws.policy(law, row, j, RULE)
    if best is not None:
        pi = tl.where(j < law.p.x.vocab, pi, -1.0)
        tl.store(best + tl.program_id(0), tl.max(pi, 0))
    else:
        pi = tl.where(tl.load(law.state.valid + row), pi, num.NAN)
        tl.store(out + row * law.p.x.vocab + j, pi, mask=j < law.p.x.vocab)


def best_of_policy(law: Law, rule: int) -> Tensor:
    """Launch policy_tiles: float32 ``[rows, tiles]``."""
    x = law.p.x
    best = scratch(x.data, x.rows, x.tiles, dtype=torch.float32)
    launch(policy_tiles, best.numel(), law, None, best, RULE=rule, num_warps=8)
    return best


@triton.jit
def most_probable(law, best, row, RULE: tl.constexpr):
    """The first token of a row that has the largest pi."""
    top, j = rows.best_tile(best, row, tiles_of(law.p.x.vocab))
    return rows.first_of(laws.policy(law, row, j, RULE) == top, j)


@jit
def kept_tiles(law, most, next_most, least, RULE: tl.constexpr):
    """The largest, the next and the smallest logit that a rule keeps whole in each tile."""
    row, j, x = laws.tile(law.p.x)
    keeps = (laws.mu(law, row, j, x, RULE) == 0.0) & (j < law.p.x.vocab)
    kept = tl.where(keeps, x, -num.INFINITY)
    top = tl.max(kept, 0)
    rest = tl.where(j == rows.first_of(kept == top, j), -num.INFINITY, kept)
    tl.store(most + tl.program_id(0), top)
    tl.store(next_most + tl.program_id(0), tl.max(rest, 0))
    tl.store(least + tl.program_id(0), tl.min(tl.where(keeps, x, num.INFINITY), 0))


def kept_logits(law: Law, rule: int) -> tuple[Tensor, ...]:
    """Launch kept_tiles: three of float32 ``[rows, tiles]``."""
    x = law.p.x
    out = tuple(scratch(x.data, x.rows, x.tiles, dtype=torch.float32) for _ in range(3))
    launch(kept_tiles, x.rows * x.tiles, law, *out, RULE=rule, num_warps=8)
    return out


@triton.jit
def greedy(law, kept, row, RULE: tl.constexpr):
    """propose_greedy of cpu/rule.h: the most probable kept token, and whether q may change it."""
    tiles, state = tiles_of(law.p.x.vocab), law.state
    mass, fraction = tl.load(state.mass + row), tl.load(state.fraction + row)
    top, j = rows.best_tile(kept[0], row, tiles)
    x = logits(law.p.x, row, j)
    token = rows.first_of((laws.mu(law, row, j, x, RULE) == 0.0) & (x == top), j)
    # The next value: of its own tile, or another tile's largest.
    t = tl.arange(0, num.MAX_TILES)
    tops = tl.load(kept[0] + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    rest = tl.load(kept[1] + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    rest = tl.max(tl.where(t == token // num.TILE, rest, tops), 0)
    some, splits = top > -num.INFINITY, fraction > 0.0
    item = tl.load(state.critical + row)
    item_x = logits(law.p.x, row, tl.maximum(item, 0))
    one = tl.where(some, laws.probability(law.p, row, top), 0.0)
    two = laws.probability(law.p, row, rest).to(tl.float64)
    share = (1.0 - fraction) * laws.probability(law.p, row, item_x).to(tl.float64)
    two = tl.where(splits & some & (share > two), share, two)
    one = tl.where(splits & (some == 0), share.to(tl.float32), one)
    _, j = rows.best_tile(law.p.tile_top, row, tiles)
    fallback = rows.first_of(logits(law.p.x, row, j) == tl.load(law.p.top + row), j)
    fallback = tl.where(splits, item, fallback)
    ahead = (two + mass).to(tl.float32) < one
    needs = ((some | splits) == 0) | ((mass > 0.0) & (ahead == 0))
    return tl.where(some, token, fallback), needs

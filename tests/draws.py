"""Calls of the operators drawn from their number alone: shapes, rules, temperatures, bad rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import torch
from torch import Tensor

from tta_ext import rules

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around a warp's 128 elements, a tile's 4096, and rows of many tiles; with wide loads and without.
SMALL = (1, 2, 3, 31, 127, 128, 129, 517, 1000)
MEDIUM = (4095, 4096, 4097, 8192, 8200, 9001, 12289)
RAGGED = (4097, 8200, 9001)
LARGE = (32000, 50257, 128256, 151936)
BAD = (float("nan"), float("inf"), None)  # None: a row of only -inf


class Draw:
    """Arguments of one call, from the numbers of a seeded generator."""

    def __init__(self, op: str, number: int, sizes: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng([zlib.crc32(op.encode()), number])
        self.sizes = sizes
        # Most calls check nothing, as on a GPU; with check both devices must raise the same.
        self.check = bool(self.chance(0.3))
        self.spoil = self.chance(0.15)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values)).to(dtype)

    def batch(self, most: int = 4) -> int:
        return self.one_of((0, 1, 1, 2, 3, most))

    def placed(self, x: Tensor) -> Tensor:
        """The same numbers with other strides and alignments."""
        if x.dim() < 2 or self.chance(0.4):
            return x
        left, right = self.below(9), self.below(9)
        wide = torch.full((*x.shape[:-1], left + x.shape[-1] + right), torch.nan, dtype=x.dtype)
        view = wide[..., left : left + x.shape[-1]]
        view.copy_(x)
        return view

    def logits(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Language-model-like rows, ties, impossible tokens, peaks, rows as flat as a few bands of
        a histogram, logits that differ where their float32 probabilities do not; now and then a bad
        row."""
        dtype = dtype or self.one_of(DTYPES)
        x = self.rng.normal(size=shape).astype(np.float32) * 2.5
        kind = self.one_of(
            ("model", "ties", "impossible", "peaked", "flat", "close", "narrow", "plateaus")
        )
        if kind == "ties":
            x = np.round(x * 2) / 2
        elif kind == "impossible":
            gone = self.rng.random(shape) < 0.4
            gone[..., self.below(shape[-1])] = False
            x[gone] = -np.inf
        elif kind == "peaked":
            x *= 12
        elif kind == "flat":
            x[...] = 1.5
        elif kind == "close":
            x *= 1e-8
        elif kind == "narrow":
            x *= 2e-3
        elif kind == "plateaus":
            x = np.sign(x)
        elif x.size:
            top = self.rng.integers(shape[-1], size=4)
            x[..., top] = np.float32([14, 13, 12, 10])
        if self.spoil and x.size and self.chance(0.5):
            row = x.reshape(-1, shape[-1])[self.below(x.size // shape[-1])]
            bad = self.one_of(BAD)
            if bad is None:
                row[:] = -np.inf
            else:
                row[self.below(row.size)] = bad
        return self.placed(torch.empty(shape, dtype=dtype).copy_(torch.from_numpy(x)))

    def per_row(self, batch: int, limit: int) -> Tensor:
        """A number, a number in device memory, or one a row."""
        shape = self.one_of(((), (1,), (batch,)))
        return self.tensor(self.rng.integers(limit, size=shape), torch.int64)

    def seed(self) -> Tensor:
        bits = self.rng.integers(-(2**63), 2**63 - 1, size=self.one_of(((), (1,))))
        return self.tensor(bits, torch.int64)

    def temperature(self) -> float:
        return self.one_of((1.0, 1.0, 0.7, 1.3, 0.05, 20.0))

    def rule(self, batch: int, *, p_only: bool = False, rows: int = 0) -> tuple[Any, ...]:
        """param, rule, critical, temperature, rule_temperature."""
        name = self.one_of(cases.P_ONLY if p_only else rules.RULE_NAMES)
        if self.chance(0.3):
            name = "knapsack"
        choices = [p for p in cases.PARAMS[name] if p is not None] or [0.0]
        shapes = [(), (1,), (batch,)] + [(rows,)] * (rows > 0)
        shape = self.one_of(shapes)
        param = self.rng.choice(choices, size=shape)
        if name == "knapsack" and self.chance(0.5):
            param = self.rng.random(size=shape)
        t = self.temperature()
        return (
            self.tensor(param, torch.float64),
            rules.rule_code(name),
            self.below(3),
            t,
            t if self.chance(0.6) else self.temperature(),
        )

    def key(self, batch: int) -> tuple[Any, ...]:
        """seed, position, sequence, iteration, rollout, do_sample."""
        return (
            self.seed(),
            self.per_row(batch, 2**32),
            self.per_row(batch, 2**32),
            self.below(2**12),
            self.per_row(batch, 2**16),
            not self.chance(0.2),
        )


def _pair(d: Draw) -> tuple[int, Tensor, Tensor]:
    b, v = d.batch(), d.one_of(d.sizes)
    return b, d.logits(b, v), d.logits(b, v)


def deferral_mask(d: Draw) -> tuple[Any, ...]:
    b, base, proxy = _pair(d)
    p_only = d.chance(0.5)
    lazy = p_only and d.chance(0.8)
    return base, None if lazy else proxy, *d.rule(b, p_only=p_only), d.check


def deferral_probs(d: Draw) -> tuple[Any, ...]:
    b, base, proxy = _pair(d)
    return base, proxy, *d.rule(b), d.check


def deferral_propose(d: Draw) -> tuple[Any, ...]:
    b, base, _ = _pair(d)
    return base, *d.rule(b, p_only=True), *d.key(b), d.check


def deferral_sample(d: Draw) -> tuple[Any, ...]:
    b, base, proxy = _pair(d)
    return base, proxy, *d.rule(b), *d.key(b), d.check


def deferral_verify(d: Draw) -> tuple[Any, ...]:
    b, v, k = d.batch(3), d.one_of(d.sizes), d.one_of((0, 1, 2, 4))
    rows = k + 1 if d.chance(0.6) or k == 0 else k
    base = d.logits(b, k + 1, v)
    # A proxy that is like the base accepts often, so that later positions are reached.
    proxy = d.logits(b, rows, v, dtype=base.dtype)
    if d.chance(0.6):
        proxy = d.placed((base[:, :rows].float() + 0.3 * torch.tanh(proxy.float())).to(base.dtype))
    tops = proxy[:, :k].float().nan_to_num(-1e30).argmax(-1).numpy()
    draft = np.where(d.rng.random((b, k)) < 0.6, tops, d.rng.integers(v, size=(b, k)))
    lengths = d.rng.integers(k + 1, size=b) if d.chance(0.5) else np.full(b, k)
    drafts, draft_length = d.tensor(draft, torch.int64), d.tensor(lengths, torch.int64)
    if d.chance(0.3):
        drafts = drafts.t().contiguous().t()
    rule = d.rule(b, rows=b * (k + 1))
    return base, proxy, drafts, draft_length, *rule, *d.key(b), d.chance(0.5), d.check


def _mixture(d: Draw) -> tuple[int, tuple[Any, ...]]:
    b, v, e = d.batch(3), d.one_of(d.sizes), d.one_of((1, 1, 2, 3))
    beta = d.tensor(d.rng.normal(size=e), torch.float32)
    base, expert = d.logits(b, v), d.logits(e, b, v)
    anti = d.logits(e, b, v) if d.chance(0.6) else None
    if d.spoil and b and anti is not None and d.chance(0.3):  # both rule everything out
        at = d.below(e), d.below(b)
        expert[at] = anti[at] = -torch.inf
    return b, (base, expert, anti, beta, d.temperature())


def implicit_reward_probs(d: Draw) -> tuple[Any, ...]:
    return *_mixture(d)[1], d.check


def implicit_reward_sample(d: Draw) -> tuple[Any, ...]:
    b, models = _mixture(d)
    return *models, *d.key(b), d.check


def categorical_sample(d: Draw) -> tuple[Any, ...]:
    b = d.batch()
    logits = d.logits(b, d.one_of(d.sizes))
    return logits, d.temperature(), *d.key(b), d.below(10), d.below(2**32), d.check


def greedy_knapsack(d: Draw) -> tuple[Any, ...]:
    b, v = d.batch(), d.one_of(d.sizes)
    profit, weight = (d.rng.random((b, v)).astype(np.float32) for _ in range(2))
    if d.chance(0.4):  # ties of density
        profit, weight = np.ceil(profit * 4), np.ceil(weight * 3) / 4
    weight[d.rng.random((b, v)) < 0.1] = 0
    if d.spoil and profit.size:
        d.one_of((profit, weight)).reshape(-1)[d.below(profit.size)] = d.one_of((-1.0, np.nan))
    shape = d.one_of(((), (1,), (b,)))
    capacity = d.rng.random(shape) * d.one_of((0.0, 0.01, 0.3, 1.5)) * v
    return (
        d.placed(torch.from_numpy(profit)),
        d.placed(torch.from_numpy(weight)),
        d.tensor(capacity, torch.float64),
        d.check,
    )


def prelogit_perturb(d: Draw) -> tuple[Any, ...]:
    n, p, tau = d.one_of((0, 1, 2, 5)), d.one_of((1, 2)), d.one_of((1, 3))
    dim = d.one_of(d.sizes)
    hidden = d.rng.normal(size=(n, dim)).astype(np.float32)
    mean = d.rng.normal(size=(p, tau, dim)).astype(np.float32)
    return (
        d.placed(torch.from_numpy(hidden).to(d.one_of(DTYPES))),
        torch.from_numpy(mean),
        d.per_row(n, tau + 1),
        d.per_row(n, p),
        d.per_row(n, 2**32),
        d.per_row(n, 2**16),
        d.below(2**12),
        d.one_of((0.5, 0.5, 0.0, 1e-3)),
        d.seed(),
        d.check,
    )


def importance_weights(d: Draw) -> tuple[Any, ...]:
    p, n = d.one_of((0, 1, 3)), d.one_of((1, 2, 5, 32, 100, 1000))
    x = d.rng.normal(size=(3, p, n)).astype(np.float32)
    if d.spoil and x.size:
        x[d.below(3), d.below(p), d.below(n)] = d.one_of((np.nan, np.inf, -np.inf))
    reward, dot, norm2 = (d.placed(torch.from_numpy(y.copy())) for y in x)
    lam = d.one_of((0.0, 0.3, 5.0))
    return reward, dot, norm2.abs(), lam, d.one_of((0.0, 0.9, 1.0)), d.one_of((0.0, 0.5)), d.check


def control_update(d: Draw) -> tuple[Any, ...]:
    p, tau, dim = d.one_of((1, 2)), d.one_of((1, 3)), min(d.one_of(d.sizes), 1000)
    n = d.one_of((1, 2, 7, 8, 33, 70))
    mean = torch.from_numpy(d.rng.normal(size=(p, tau, dim)).astype(np.float32))
    weights = d.rng.random((p, n)).astype(np.float32)
    weights[d.rng.random((p, n)) < 0.3] = 0
    if d.spoil:
        weights[d.below(p), d.below(n)] = d.one_of((np.nan, np.inf))
    length = d.tensor(d.rng.integers(tau + 1, size=(p, n)), torch.int64)
    size = 1 << (n - 1).bit_length()
    shards = d.one_of((1, 1, 2))
    shard = max(1, size // shards)
    start = shard * d.below(max(1, n // shard))
    partial = shard < size
    return (
        mean,
        torch.from_numpy(weights),
        length if d.chance(0.6) else None,
        d.seed(),
        d.per_row(p, 2**32),
        d.below(2**12),
        d.one_of((0.5, 0.5, 0.0)),
        start,
        start + shard,
        partial,
        d.check,
    )


def control_merge(d: Draw) -> tuple[Any, ...]:
    shape = (d.one_of((1, 2)), d.one_of((1, 3)), min(d.one_of(d.sizes), 5000))
    shards = d.one_of((1, 2, 4, 8))
    mean, partials = (
        torch.from_numpy(d.rng.normal(size=s).astype(np.float32)) for s in (shape, (shards, *shape))
    )
    return mean, partials, d.one_of((0.5, 0.0))


def philox(d: Draw) -> tuple[Any, ...]:
    words = d.rng.integers(2**32, size=(d.one_of((0, 1, 5, 700)), 4))
    return d.tensor(words, torch.int64), d.tensor(d.rng.integers(2**32, size=2), torch.int64)


def normal(d: Draw) -> tuple[Any, ...]:
    n = d.one_of((0, *d.sizes))
    return n, d.seed(), d.below(2**32), d.below(2**32), d.below(2**12), d.below(2**16)


ARGUMENTS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "deferral_mask": deferral_mask,
    "deferral_probs": deferral_probs,
    "deferral_stats": deferral_mask,
    "deferral_propose": deferral_propose,
    "deferral_sample": deferral_sample,
    "deferral_verify": deferral_verify,
    "implicit_reward_probs": implicit_reward_probs,
    "implicit_reward_sample": implicit_reward_sample,
    "categorical_sample": categorical_sample,
    "greedy_knapsack": greedy_knapsack,
    "prelogit_perturb": prelogit_perturb,
    "importance_weights": importance_weights,
    "control_update": control_update,
    "control_merge": control_merge,
    "philox": philox,
    "normal": normal,
}

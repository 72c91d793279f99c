"""What float64 knows of a row: random words, laws, bounds where float32 may decide otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oracle import EDGE, screen64, softmax64
from torch import Tensor

from tta_ext import rng
from tta_ext.rules import NEEDS_PROXY, RULE_NAMES

Array = NDArray[Any]
# Rounding of one probability, relative; and below this float32 holds none to that accuracy.
CLOSE, TINY = 2.0**-16, 2.0**-124

MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10 of counters ``[..., 4]``, as unsigned 64-bit integers below 2^32."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64) & LOW, -1, 0)
    k = [int(word) & 0xFFFFFFFF for word in key]
    for _ in range(10):
        a, b = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        high = np.uint64(32)
        c0, c1, c2, c3 = (
            (b >> high) ^ c1 ^ np.uint64(k[0]), b & LOW,
            (a >> high) ^ c3 ^ np.uint64(k[1]), a & LOW,
        )  # fmt: skip
        k = [(word + step) & 0xFFFFFFFF for word, step in zip(k, KEY_STEPS, strict=True)]
    return np.stack((c0, c1, c2, c3), -1)


def _words(seed: int, c0: Array, c1: int, c2: int, tag: int, iteration: int, rollout: int) -> Array:
    c0 = np.asarray(c0, np.uint64)
    rest = [np.full_like(c0, x) for x in (c1, c2, tag << 28 | iteration << 16 | rollout)]
    return philox4x32(np.stack((c0, *rest), -1), (seed, seed >> 32))


def normals(n: int, seed: int, step: int, sequence: int, iteration: int, rollout: int) -> Array:
    """The first n noise numbers of a step, by Box-Muller."""
    blocks = np.arange((n + 3) // 4)
    x = _words(seed, blocks, step, sequence, rng.NOISE, iteration, rollout)
    u = (2.0 * (x >> np.uint64(9)).astype(np.float64) + 1) * 2.0**-24
    radius, angle = np.sqrt(-2 * np.log(u[:, ::2])), 2 * np.pi * u[:, 1::2]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(-1)[:n]


# ---------------------------------------------------------------------------- laws


@dataclass
class Law:
    """A row under a rule: p and q, bounds of mu, pi and D, the critical item (None: on an edge)."""

    p: Array
    q: Array
    lo: Array
    hi: Array
    critical: int | None

    @property
    def mass(self) -> tuple[float, float]:
        return float((self.lo * self.p).sum()), float((self.hi * self.p).sum())

    @property
    def pi(self) -> tuple[Array, Array]:
        low, high = self.mass
        return (1 - self.hi) * self.p + self.q * low, (1 - self.lo) * self.p + self.q * high


def usable(x: Tensor) -> bool:
    """Whether a row of logits has a law."""
    x = x.float()
    return bool(not (x.isnan() | (x == torch.inf)).any() and (x > -torch.inf).any())


def _bounds(a: Any, base: Tensor, proxy: Tensor | None, param: float) -> tuple[Array, Array, Any]:
    p = softmax64(base[None], a.rule_temperature)[0].numpy()
    if RULE_NAMES[a.rule] != "knapsack":
        given = {"rule": RULE_NAMES[a.rule], "param": param, "rule_temperature": a.rule_temperature}
        s = screen64(base[None], None if proxy is None else proxy[None], given)
        seen = (p,) if proxy is None else (p, softmax64(proxy[None], a.rule_temperature)[0].numpy())
        sure = s.certain[0].numpy() & np.all([(x == 0) | (x > TINY) for x in seen], 0)
        mu = s.mask[0].numpy().astype(float)
        return np.where(sure, mu, 0), np.where(sure, mu, 1), -1
    order = np.argsort((base.float() + 0.0).numpy(), kind="stable")
    weight = p[order]
    used = np.cumsum(weight)
    edge = np.minimum(EDGE, CLOSE * used)
    before, slack = np.append(0.0, used[:-1]), np.append(0.0, edge[:-1])
    everything = param >= 1
    # Weights below the smallest normal float32 of their tile's are none.
    small = weight < 2.0**-125 * p.max()
    doubt = param < TINY and bool(((weight > 0) & small).any())
    least = np.append(0.0, np.cumsum(np.where(small, 0.0, weight))[:-1])
    taken = (used <= param - edge) | everything | (used == 0)
    taken &= ~(doubt & (used <= TINY))
    # What may be the first item not taken: it may not fit, and all before it may.
    may = ~taken & ((before <= param + slack) | (doubt & (least <= TINY)))
    fill = np.clip((param - before) / np.maximum(weight, 1e-300), 0, 1)
    blur = (edge + slack) / np.maximum(weight, 1e-300)
    sure = not doubt and may.sum() == 1 and (used > param + edge)[may].all()
    low, high = taken.astype(float), taken | may
    if sure:
        policy = ("exclude", "include", "split")[a.critical]
        low[may] = {"exclude": 0, "include": 1, "split": np.clip(fill - blur, 0, 1)[may]}[policy]
        high = high.astype(float)
        high[may] = {"exclude": 0, "include": 1, "split": np.clip(fill + blur, 0, 1)[may]}[policy]
    lo, hi = np.empty_like(p), np.empty_like(p)
    lo[order], hi[order] = low, high
    critical = int(order[may][0]) if sure else None if may.any() else -1
    return lo, hi, critical


def law(a: Any, base: Tensor, proxy: Tensor | None, param: float) -> Law | None:
    """None where the row has no law: bad logits among those read, a bad parameter."""
    reads = a.rule in NEEDS_PROXY
    if not usable(base) or np.isnan(param) or (RULE_NAMES[a.rule] == "knapsack" and param < 0):
        return None
    if reads and (proxy is None or not usable(proxy)):
        return None
    lo, hi, critical = _bounds(a, base, proxy if reads else None, param)
    p = softmax64(base[None], a.temperature)[0].numpy()
    good = proxy is not None and usable(proxy)
    q = softmax64(proxy[None], a.temperature)[0].numpy() if good else np.full_like(p, np.nan)
    return Law(p, q, lo, hi, critical)


def within(x: Any, low: Any, high: Any, slack: float = 1e-36) -> bool:
    """Inside of an interval, up to rounding; NaN never is."""
    x, low, high = (np.asarray(value, np.float64) for value in (x, low, high))
    return bool(((x >= low * (1 - CLOSE) - slack) & (x <= high * (1 + CLOSE) + slack)).all())


def drawn(weights: Array, u: float, edge: float = EDGE) -> Array:
    """The tokens whose part of the cumulative law u may lie in."""
    total = np.cumsum(weights)
    share, upper = weights / total[-1], total / total[-1]
    return (weights > 0) & (upper - share - edge <= u) & (u <= upper + edge)


def best(low: Array, high: Array) -> Array:
    """The tokens that may have the highest of some numbers known within bounds."""
    return high * (1 + CLOSE) + 1e-36 >= low.max()


def each(x: Tensor, b: int) -> Any:
    """A small argument's value for a row."""
    flat = x.reshape(-1)
    return flat[b if flat.numel() > 1 else 0].item()


class Key:
    """A row's random numbers; None where its indices have none."""

    def __init__(self, a: Any, b: int, more: int = 0) -> None:
        self.seed = each(a.seed, 0)
        self.position, self.sequence, self.rollout = (
            each(x, b) for x in (a.position, a.sequence, a.rollout)
        )
        self.iteration = a.iteration
        self.named = (
            0 <= self.position < 2**32 - more
            and 0 <= self.sequence < 2**32
            and 0 <= self.rollout < 2**16
        )

    def uniform(self, stream: int, further: int = 0, draw: int = 0) -> float:
        place = (self.position + further, self.sequence, stream, self.iteration, self.rollout)
        return int(_words(self.seed, np.array([draw]), *place)[0, 0]) * 2.0**-32

"""What every operator means, in float64 and by sorting and enumeration; judges of its results.

Written from the definitions (rules, streams, laws), not from a backend; random words too are made
here. A judge takes an operator's arguments and outputs as they were and yields a sentence for each
thing that is wrong. A kernel in float32 may decide otherwise where the deciding number lies on an
edge, so what a judge knows of a probability, a mass or mu is an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    doubt = param < TINY and bool(((weight > 0) & (weight < 2.0**-125 * p.max())).any())
    taken = (used <= param - edge) | everything | (used == 0)
    taken &= ~(doubt & (used <= TINY))
    # What may be the first item not taken: it may not fit, and all before it may.
    may = ~taken & ((before <= param + slack) | (doubt & (before <= TINY)))
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


def drawn(weights: Array, u: float) -> Array:
    """The tokens whose part of the cumulative law u may lie in."""
    total = np.cumsum(weights)
    share, upper = weights / total[-1], total / total[-1]
    return (weights > 0) & (upper - share - EDGE <= u) & (u <= upper + EDGE)


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


# ---------------------------------------------------------------------------- deferral

Faults = Iterator[str]


def _rows(a: Any) -> Iterator[tuple[int, Tensor | None, Law | None]]:
    proxy = getattr(a, "proxy_logits", None)
    for b, base in enumerate(a.base_logits):
        other = None if proxy is None else proxy[b]
        yield b, other, law(a, base, other, each(a.param, b))


def deferral_mask(a: Any, mask: Tensor, critical: Tensor, fraction: Tensor) -> Faults:
    for b, _, it in _rows(a):
        if it is None:
            if mask[b].any() or critical[b] != -2 or not fraction[b].isnan():
                yield f"row {b} has no law and is not marked"
            continue
        got, part = mask[b].numpy(), float(fraction[b])
        split = np.zeros_like(got)
        if a.critical == 2 and critical[b] >= 0:
            split[int(critical[b])] = True
        if not ((got >= (it.lo == 1)) & ((got <= (it.hi > 0)) | split)).all():
            yield f"row {b} has other tokens in its mask"
        if it.critical is not None and int(critical[b]) != it.critical:
            yield f"row {b} has the critical item {critical[b]}, expected {it.critical}"
        if not 0 <= part <= 1:
            yield f"row {b} has the fraction {part}"
        if it.critical is not None and it.critical >= 0:
            low, high = it.lo[it.critical], it.hi[it.critical]
            if not within(part, low, high, 1e-6):
                yield f"row {b} has the fraction {part}, expected {low} to {high}"


def deferral_probs(a: Any, out: Tensor) -> Faults:
    for b, proxy, it in _rows(a):
        if it is None or not usable(proxy):
            if not out[b].isnan().all():
                yield f"row {b} has no law and a probability"
        elif not within(out[b].numpy(), *it.pi):
            yield f"row {b} is not pi"


def deferral_stats(a: Any, mass: Tensor, critical: Tensor, cut: Tensor, used: Tensor) -> Faults:
    for b, _, it in _rows(a):
        if it is None:
            marked = mass[b].isnan() and critical[b] == -2 and cut[b].isnan() and used[b].isnan()
            if not marked:
                yield f"row {b} has no law and is not marked"
            continue
        if not within(float(mass[b]), *it.mass, EDGE):
            yield f"row {b} has D = {mass[b]}, expected {it.mass}"
        p = softmax64(a.base_logits[b][None], a.rule_temperature)[0].numpy()
        if not within(float(used[b]), (it.lo * p).sum(), (it.hi * p).sum(), EDGE):
            yield f"row {b} has used {used[b]}"
        if it.critical is not None and int(critical[b]) != it.critical:
            yield f"row {b} has the critical item {critical[b]}, expected {it.critical}"
        x = a.base_logits[b].float()
        kept = [x[torch.from_numpy(bound < 1)] for bound in (it.hi, it.lo)]
        if RULE_NAMES[a.rule] != "knapsack":
            high, low = (float(k.min()) if len(k) else np.inf for k in kept)
            if not low <= float(cut[b]) <= high:
                yield f"row {b} has the cut {cut[b]}, expected {low} to {high}"
        elif it.critical is not None:
            wanted = float(x[it.critical]) if it.critical >= 0 else np.inf
            if float(cut[b]) != wanted:
                yield f"row {b} has the cut {cut[b]}, expected {wanted}"


def _choice(a: Any, it: Law, key: Key, stream: int, further: int = 0) -> tuple[Array, Array]:
    """The base model's tokens that may be final, and those that may be rejected."""
    if not a.do_sample:
        low, high = (1 - it.hi) * it.p, (1 - it.lo) * it.p
        top = best(low, high)
        second = np.array([np.max(np.delete(low, v), initial=0) for v in np.flatnonzero(top)])
        third = np.array([np.max(np.delete(high, v), initial=0) for v in np.flatnonzero(top)])
        final, asked = top.copy(), top | (high.max() <= 1e-36) | (low.max() <= 1e-36)
        at = np.flatnonzero(top)
        final[at] = (high[at] * (1 + CLOSE) >= (second + it.mass[0]) * (1 - CLOSE)) & (high[at] > 0)
        asked[at] &= low[at] * (1 - CLOSE) <= (third + it.mass[1]) * (1 + CLOSE) + EDGE
        return final, asked
    may, s = drawn(it.p, key.uniform(stream, further)), key.uniform(rng.SPLIT, further)
    return may & ((it.lo < 1) & (s >= it.lo)), may & ((it.hi > 0) & (s < it.hi))


def deferral_propose(a: Any, token: Tensor, deferred: Tensor) -> Faults:
    for b, _, it in _rows(a):
        v, flag, key = int(token[b]), bool(deferred[b]), Key(a, b)
        if it is None:
            if v != -1 or flag:
                yield f"row {b} has no law and the token {v}"
        elif key.named or not a.do_sample:
            final, rejected = _choice(a, it, key, rng.BASE)
            if not 0 <= v < len(it.p) or not (rejected if flag else final)[v]:
                yield f"row {b} proposes {v} (deferred: {flag})"


def _emitted(
    a: Any, it: Law, proxy: Tensor | None, key: Key, stream: int, further: int, v: int, flag: bool
) -> str:
    """What is wrong with a token of pi; "" if nothing is. No proxy: the caller would draw it."""
    final, rejected = _choice(a, it, key, stream, further)
    bad_proxy = proxy is not None and not usable(proxy)
    if v == -1:
        if flag and proxy is None and rejected.any():
            return ""
        # Greedy choices may look at the proxy wherever they like.
        read = rejected.any() or not a.do_sample
        return "" if not flag and bad_proxy and read else "no token from a good row"
    if not 0 <= v < len(it.p):
        return f"the token {v}"
    if not a.do_sample:
        if final[v] and not rejected.any() and not flag:
            return ""
        if proxy is None or bad_proxy:
            return "" if final[v] and not flag else f"the token {v}, which q decides"
        if not best(*it.pi)[v]:
            return f"the token {v}, no argmax of pi"
        return "" if it.lo[v] <= flag <= it.hi[v] or 0 < it.hi[v] < 1 and not flag else "the flag"
    if not flag:
        return "" if final[v] else f"the token {v} of the base"
    if proxy is None or bad_proxy or not rejected.any():
        return f"the token {v} of the proxy"
    return "" if drawn(it.q, key.uniform(rng.PROXY, further))[v] else f"{v} in place of a rejected"


def deferral_sample(a: Any, token: Tensor, deferred: Tensor) -> Faults:
    for b, proxy, it in _rows(a):
        v, flag, key = int(token[b]), bool(deferred[b]), Key(a, b)
        if it is None:
            if v != -1 or flag:
                yield f"row {b} has no law and the token {v}"
        elif key.named or not a.do_sample:
            assert proxy is not None
            fault = _emitted(a, it, proxy, key, rng.BASE, 0, v, flag)
            if fault:
                yield f"row {b}: {fault}"


def _verdict(a: Any, it: Law, x: int, key: Key, k: int) -> tuple[bool, bool]:
    """Whether a draft token may be accepted, and whether it may be refused."""
    low, high = it.pi
    if not a.do_sample:
        may = best(low, high)
        return bool(may[x]), not may[x] or int(may.sum()) > 1
    r, q = key.uniform(rng.VERIFY, k), it.q[x]
    empty = it.mass[1] >= 1 - 1e-6 or np.maximum(high - it.q, 0).sum() <= 1e-6
    return (
        q > 0 and (r * q * (1 - CLOSE) <= high[x] + EDGE * q or empty),
        q <= TINY or r * q * (1 + CLOSE) >= low[x] - EDGE * q,
    )


def _verified(a: Any, b: int, got: tuple[int, int, bool, Array]) -> str:
    accepted, token, flag, mass = got
    positions, length, key = a.base_logits.shape[1], int(each(a.draft_length, b)), Key(a, b)
    for k in range(length + 1):
        many = a.param.numel() not in (1, a.base_logits.shape[0])
        param = each(a.param, b * positions + k if many else b)
        proxy = a.proxy_logits[b, k] if k < a.proxy_logits.shape[1] else None
        it = law(a, a.base_logits[b, k], proxy, param)
        if it is None or (k < length and not usable(proxy)):
            done = accepted == k and token == -1 and not flag and np.isnan(mass[k])
            return "" if done else f"position {k} has no law and is not marked"
        if k < length and accepted >= k:
            x = int(a.draft[b, k])
            may, may_not = _verdict(a, it, x, key, k)
            if accepted > k:
                if not may:
                    return f"draft token {k} is accepted"
            elif not may_not:
                return f"draft token {k} is refused"
        if a.return_mass and not np.isnan(mass[k]) and not within(mass[k], *it.mass, EDGE):
            return f"D at position {k} is {mass[k]}, expected {it.mass}"
        if accepted > k:
            continue
        if k == length:
            fault = _emitted(a, it, proxy, key, rng.BONUS, k, token, flag)
        else:
            fault = _residual(a, it, key, k, token)
        if not fault and (mass[k + 1 :] != -1).any():
            fault = "a mass after the last position"
        return fault and f"position {k}: {fault}"
    return f"{accepted} accepted of {length}"


def _residual(a: Any, it: Law, key: Key, k: int, token: int) -> str:
    if not 0 <= token < len(it.p):
        return f"the token {token}"
    if not a.do_sample:
        return "" if best(*it.pi)[token] else f"the token {token}, no argmax of pi"
    low, high = it.mass
    if high - low > EDGE or (it.lo != it.hi).any():
        return ""  # the law hangs on an edge
    law = np.maximum((1 - it.lo) * it.p - (1 - low) * it.q, 0)
    if law.sum() < 1e-3:  # differences of nearly equal numbers
        return ""
    may = drawn(law + 1e-12, key.uniform(rng.RESIDUAL, k))
    near = np.convolve(may, [1, 1, 1], "same") > 0
    return "" if may[token] or (near[token] and law[token] > 0) else f"{token} is not the residual"


def deferral_verify(
    a: Any, accepted: Tensor, token: Tensor, deferred: Tensor, mass: Tensor
) -> Faults:
    vocabulary = a.base_logits.shape[-1]
    for b in range(a.base_logits.shape[0]):
        length = int(each(a.draft_length, b))
        draft = a.draft[b, : max(length, 0)]
        named = Key(a, b, a.base_logits.shape[1] - 1).named or not a.do_sample
        good = 0 <= length < a.base_logits.shape[1] and ((draft >= 0) & (draft < vocabulary)).all()
        if named and good:
            got = int(accepted[b]), int(token[b]), bool(deferred[b]), mass[b].numpy()
            fault = _verified(a, b, got)
            if fault:
                yield f"row {b}: {fault}"


# ---------------------------------------------------------------------------- other draws


# Whether an expert that is off or rules everything out spoils its row: backends differ.
NOBODY_KNOWS = torch.full((1,), torch.nan)


def _scores(a: Any, b: int) -> Tensor | None:
    """log p + sum of beta (log q - log q0), up to a constant; None without a law."""
    base = a.base_logits[b].double()
    if not usable(a.base_logits[b]) or not bool(a.beta.isfinite().all()):
        return None
    total = base.clone()
    for e, beta in enumerate(a.beta.reshape(-1).tolist()):
        term, models = a.expert_logits[e, b].double(), [a.expert_logits[e, b]]
        if a.anti_logits is not None:
            anti = a.anti_logits[e, b].double()
            models.append(a.anti_logits[e, b])
            term = torch.where(torch.isneginf(term) & torch.isneginf(anti), 0.0, term - anti)
        if not all(map(usable, models)):
            return NOBODY_KNOWS
        if beta:
            total = total + beta * term
    total[torch.isneginf(base)] = -torch.inf
    known = not total.isnan().any() and (total < torch.inf).all() and (total > -torch.inf).any()
    return total if known else None


def _mixed(a: Any) -> Iterator[tuple[int, Tensor | None, float]]:
    """Each row's scores, and the rounding of one of them in units of the temperature."""
    for b in range(a.base_logits.shape[0]):
        total = _scores(a, b)
        parts = [a.base_logits[b], *a.expert_logits[:, b]]
        parts += [] if a.anti_logits is None else [*a.anti_logits[:, b]]
        sizes = [float(x.float().nan_to_num(0, 0, 0).abs().max()) for x in parts]
        scale = sum(sizes) * (1 + float(a.beta.abs().sum()))
        if (
            scale < 1e37 and total is not NOBODY_KNOWS
        ):  # else float32 overflows where float64 does not
            yield b, total, scale * 2.0**-22 / a.temperature


def implicit_reward_probs(a: Any, out: Tensor) -> Faults:
    for b, total, blur in _mixed(a):
        if total is None:
            if not out[b].isnan().all():
                yield f"row {b} has no law and a probability"
        elif blur < 0.01:
            want = softmax64(total[None], a.temperature)[0].numpy()
            if not within(out[b].numpy(), want * (1 - 4 * blur), want * (1 + 4 * blur)):
                yield f"row {b} is not the tilted law"


def implicit_reward_sample(a: Any, out: Tensor) -> Faults:
    for b, total, blur in _mixed(a):
        v, key = int(out[b]), Key(a, b)
        if total is None:
            if v != -1:
                yield f"row {b} has no law and the token {v}"
        elif blur < 1e-7 or not a.do_sample:
            yield from _token(b, v, total, a, key, rng.BASE, 0, 4 * blur * a.temperature)


def _token(
    b: int, v: int, x: Tensor, a: Any, key: Key, stream: int, draw: int, slack: float
) -> Faults:
    if not 0 <= v < len(x) or x[v] == -torch.inf:
        yield f"row {b} has the token {v}"
    elif not a.do_sample:
        if x[v] < x.max() - slack or (not slack and (x[:v] == x.max()).any()):
            yield f"row {b} has the token {v}, no argmax"
    elif key.named:
        p = softmax64(x[None], a.temperature)[0].numpy()
        if not drawn(p, key.uniform(stream, draw=draw))[v]:
            yield f"row {b} has the token {v}, not that of its uniform"


def categorical_sample(a: Any, out: Tensor) -> Faults:
    for b, x in enumerate(a.logits):
        v = int(out[b])
        if not usable(x):
            if v != -1:
                yield f"row {b} has no law and the token {v}"
            continue
        yield from _token(b, v, x.double(), a, Key(a, b), a.stream, a.draw, 0.0)


def greedy_knapsack(
    a: Any, selected: Tensor, used: Tensor, value: Tensor, critical: Tensor, bound: Tensor
) -> Faults:
    for b in range(a.profit.shape[0]):
        profit, weight = (x[b].double().numpy() for x in (a.profit, a.weight))
        room = each(a.capacity, b)
        bad = ~(np.isfinite(profit) & np.isfinite(weight) & (profit >= 0) & (weight >= 0)).all()
        if bad or np.isnan(room) or room < 0:
            if selected[b].any() or critical[b] != -2 or not value[b].isnan():
                yield f"row {b} is invalid and not marked"
            continue
        take = weight == 0
        items = np.flatnonzero(~take & (weight <= room))
        items = items[np.argsort(-(profit[items] / weight[items]), kind="stable")]
        total = np.cumsum(weight[items])
        # A running weight of float64 is exact within 2^-40 of itself, whatever its order.
        fits, doubt = total <= room, np.abs(total - room) <= 2.0**-40 * total
        got = selected[b].numpy()
        first = int(np.argmin(fits)) if not fits.all() else len(items)
        want = take.copy()
        want[items[:first]] = True
        if doubt.any():
            continue
        if (got != want).any():
            yield f"row {b} selects other items"
            continue
        at = int(items[first]) if first < len(items) else -1
        if int(critical[b]) != at:
            yield f"row {b} has the critical item {critical[b]}, expected {at}"
        gains, spent = profit[want].sum(), weight[want].sum()
        more = (room - spent) * profit[at] / weight[at] if at >= 0 else 0.0
        for name, x, y in (("used", used, spent), ("value", value, gains),
                           ("bound", bound, gains + more)):  # fmt: skip
            if not np.isclose(float(x[b]), y, rtol=1e-9, atol=1e-300):
                yield f"row {b} has {name} {float(x[b])}, expected {y}"


# ---------------------------------------------------------------------------- pre-logits


def prelogit_perturb(a: Any, out: Tensor, dot: Tensor) -> Faults:
    prompts, horizon, d = a.mean.shape
    for b in range(a.hidden.shape[0]):
        step, row, sequence, rollout = (each(x, b) for x in (a.step, a.row, a.sequence, a.rollout))
        if not (0 <= step < 2**32 and 0 <= row < prompts and 0 <= sequence < 2**32
                and 0 <= rollout < 2**16):  # fmt: skip
            continue
        x = a.hidden[b].double().numpy()
        if step >= horizon:
            same = torch.equal(out[b].nan_to_num(1.5), a.hidden[b].nan_to_num(1.5))
            if not same or dot[b] != 0:
                yield f"row {b} is changed after the window"
            continue
        u = a.mean[row, step].double().numpy()
        eps = normals(d, each(a.seed, 0), step, sequence, a.iteration, rollout)
        with np.errstate(all="ignore"):
            want, size = x + u + a.sigma * eps, np.abs(x) + np.abs(u) + a.sigma * 6
            got = out[b].double().numpy()
            limit = float(torch.finfo(out.dtype).max)
            ulp = float(torch.finfo(out.dtype).eps)
            fine = np.isfinite(want) & (size < limit / 2)
            off = np.abs(got - want)[fine] > ((2.0**-20 + ulp) * size + 1e-37 + ulp * 1e-3)[fine]
            if off.any():
                yield f"row {b} is not hidden + mean + sigma eps"
            terms = u * eps
            if np.isfinite(terms).all() and np.abs(terms).sum() < 1e37:
                if (
                    abs(float(dot[b]) - terms.sum())
                    > 2.0**-18 * (np.abs(terms) + np.abs(u)).sum() + 1e-37
                ):
                    yield f"row {b} has dot {float(dot[b])}, expected {terms.sum()}"


def importance_weights(a: Any, weights: Tensor, ess: Tensor) -> Faults:
    for b in range(a.reward.shape[0]):
        r, dot, norm = (x[b].double().numpy() for x in (a.reward, a.dot, a.norm2))
        bad = not usable(a.reward[b]) or not (np.isfinite(dot) & np.isfinite(norm)).all()
        got = weights[b].double().numpy()
        if bad:
            if not np.isnan(got).all() or not ess[b].isnan():
                yield f"row {b} has no weights and is not marked"
            continue
        if a.lam == 0:
            want = np.zeros_like(r)
            want[int(np.argmax(r))] = 1
            if (got != want).any() or ess[b] != 1:
                yield f"row {b} is not the winner's"
            continue
        with np.errstate(all="ignore"):
            score, size = (r - r.max()) / a.lam, np.where(np.isfinite(r), np.abs(r), 0) / a.lam
            if a.sigma:
                slack = (1 - a.alpha) / a.sigma
                score = score - slack * dot - slack * slack / 2 * norm
                size = size + np.abs(slack * dot) + np.abs(slack * slack / 2 * norm)
            if not np.nanmax(size) < 1e4 or not np.isfinite(np.max(score)):
                continue  # scores whose rounding is a weight of its own, or overflows
            want = np.exp(score - score.max())
            want /= want.sum()
        blur = 2.0**-21 * size.max() + 2.0**-18
        if (np.abs(got - want) > blur * want + 1e-30).any():
            yield f"row {b} is not softmax(s)"
        if not np.isclose(float(ess[b]), 1 / np.square(want).sum(), rtol=4 * blur):
            yield f"row {b} has ess {float(ess[b])}, expected {1 / np.square(want).sum()}"


def control_update(a: Any, out: Tensor) -> Faults:
    prompts, horizon, d = a.mean.shape
    count = a.weights.shape[1]
    for b in range(prompts):
        sequence, u = each(a.sequence, b), a.mean[b].double().numpy()
        w = a.weights[b].double().numpy()
        if not 0 <= sequence < 2**32 or not np.isfinite(w).all():
            continue
        if a.sigma == 0 and not a.partial:
            if not torch.equal(out[b].nan_to_num(1.5), a.mean[b].nan_to_num(1.5)):
                yield f"prompt {b} moves without noise"
            continue
        total, size = np.zeros_like(u), np.zeros_like(u)
        for i in range(a.start, min(a.stop, count)):
            end = horizon if a.length is None else int(a.length[b, i])
            for t in range(min(max(end, 0), horizon)):
                term = w[i] * normals(d, each(a.seed, 0), t, sequence, a.iteration, i)
                total[t] += term
                size[t] += np.abs(term)
        scale = 1.0 if a.partial else a.sigma
        want = scale * total + (0 if a.partial else u)
        size += np.abs(w).sum() * 0.25  # normals near 0 are as exact as others, not as themselves
        near = 2.0**-18 * (scale * size + (0 if a.partial else np.abs(u))) + 1e-36
        fine = np.isfinite(want) & (np.abs(want) < 1e37) & (size < 1e37)
        if (np.abs(out[b].double().numpy() - want)[fine] > near[fine]).any():
            yield f"prompt {b} is not the update"


def control_merge(a: Any, out: Tensor) -> Faults:
    u, parts = a.mean.double().numpy(), a.partials.double().numpy()
    if a.sigma == 0:
        if not torch.equal(out.nan_to_num(1.5), a.mean.nan_to_num(1.5)):
            yield "a merge without noise moves"
        return
    with np.errstate(all="ignore"):
        want = u + a.sigma * parts.sum(0)
        size = np.abs(u) + a.sigma * np.abs(parts).sum(0)
        fine = (size < 1e37) & (np.abs(parts).sum(0) < 1e37)
        if (np.abs(out.double().numpy() - want)[fine] > (2.0**-20 * size + 1e-37)[fine]).any():
            yield "not u + sigma times the sum"


def philox(a: Any, out: Tensor) -> Faults:
    key = tuple(a.key.reshape(-1).tolist())
    want = philox4x32(a.counter.numpy(), key)
    if (out.numpy().astype(np.uint64) != want).any():
        yield "other words"


def normal(a: Any, out: Tensor) -> Faults:
    want = normals(a.n, each(a.seed, 0), a.step, a.sequence, a.iteration, a.rollout)
    if not np.allclose(out.numpy(), want, rtol=2e-6, atol=2e-6):
        yield "other normals"


MEANINGS: dict[str, Callable[..., Faults]] = {
    judge.__name__: judge
    for judge in (
        deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample,
        deferral_verify, implicit_reward_probs, implicit_reward_sample, categorical_sample,
        greedy_knapsack, prelogit_perturb, importance_weights, control_update, control_merge,
        philox, normal,
    )
}  # fmt: skip

"""What every operator means, in float64 and by sorting and enumeration; judges of its results.

Written from the definitions (rules, streams, laws), not from a backend; random words too are made
here. A judge takes an operator's arguments and outputs as they were and yields a sentence for each
thing that is wrong. A kernel in float32 may decide otherwise where the deciding number lies on an
edge, so what a judge knows of a probability, a mass or mu is an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from bounds import CLOSE, TINY, Array, Key, Law, best, drawn, each, law, usable, within
from oracle import EDGE, softmax64
from prelogit_meanings import (
    control_merge,
    control_update,
    importance_weights,
    normal,
    philox,
    prelogit_perturb,
)
from torch import Tensor

from tta_ext import rng
from tta_ext.rules import RULE_NAMES

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
        return "" if it.lo[v] <= flag <= it.hi[v] or (0 < it.hi[v] < 1 and not flag) else "the flag"
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
    empty = it.mass[1] >= 1 - 1e-6 or np.maximum(high - it.q, 0).sum() <= 4 * EDGE
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
        elif blur < 0.01 or not a.do_sample:
            yield from _token(b, v, total, a, key, rng.BASE, 0, 4 * blur)


def _token(
    b: int, v: int, x: Tensor, a: Any, key: Key, stream: int, draw: int, blur: float
) -> Faults:
    """A token of softmax(x / T), where blur is the rounding of an x / T."""
    slack = blur * a.temperature
    if not 0 <= v < len(x) or x[v] == -torch.inf:
        yield f"row {b} has the token {v}"
    elif not a.do_sample:
        if x[v] < x.max() - slack or (not slack and (x[:v] == x.max()).any()):
            yield f"row {b} has the token {v}, no argmax"
    elif key.named:
        p = softmax64(x[None], a.temperature)[0].numpy()
        if not drawn(p, key.uniform(stream, draw=draw), EDGE + blur)[v]:
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


MEANINGS: dict[str, Callable[..., Faults]] = {
    judge.__name__: judge
    for judge in (
        deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample,
        deferral_verify, implicit_reward_probs, implicit_reward_sample, categorical_sample,
        greedy_knapsack, prelogit_perturb, importance_weights, control_update, control_merge,
        philox, normal,
    )
}  # fmt: skip

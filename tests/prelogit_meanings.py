"""Judges of the operators on pre-logits and random numbers; meanings.py has the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from bounds import each, normals, philox4x32, usable
from torch import Tensor

Faults = Iterator[str]


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
            near = 2.0**-18 * (np.abs(terms) + np.abs(u)).sum() + 1e-37  # or beyond float32
            if near < 1e33 and not abs(float(dot[b]) - terms.sum()) <= near:
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

"""Every bad input has its sentence: what was given, what is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import (
    B,
    V,
    doubles,
    draw,
    good,
    ids,
    knapsack,
    mask,
    perturb,
    propose,
    reward,
    sample,
    update,
    verify,
    weights,
)

from tta_ext import ops, use_backend

Case = tuple[Callable[[], Any], type[Exception], str]

STATIC: dict[str, Case] = {
    # tensors
    "not a tensor": (
        lambda: sample([[0.0]]),
        TypeError,
        "base_logits is list, expected a tensor [B, V]",
    ),
    "float64": (
        lambda: sample(good().double()),
        TypeError,
        "base_logits has dtype torch.float64, expected torch.float32, torch.float16 or "
        "torch.bfloat16",
    ),
    "int logits": (lambda: draw(ids(1)[None]), TypeError, "logits has dtype torch.int64"),
    "one dimension": (
        lambda: propose(torch.zeros(V)),
        ValueError,
        "base_logits has shape [8], expected [B, V]",
    ),
    "empty vocabulary": (
        lambda: propose(torch.zeros(B, 0)),
        ValueError,
        "base_logits has a last dimension of 0, expected 1 to 1048576",
    ),
    "vocabulary too large": (
        lambda: propose(torch.zeros(1, (1 << 20) + 1, dtype=torch.bfloat16)),
        ValueError,
        "base_logits has a last dimension of 1048577, expected 1 to 1048576",
    ),
    "strided vocabulary": (
        lambda: propose(torch.zeros(V, B).t()),
        ValueError,
        "base_logits has stride 3 over its last dimension, expected 1; call .contiguous() on it",
    ),
    "vocabularies differ": (
        lambda: sample(good(), torch.zeros(B, V + 1)),
        ValueError,
        "proxy_logits has shape [3, 9], expected that of base_logits, [3, 8]",
    ),
    "devices differ": (
        lambda: sample(good(), torch.zeros(B, V, device="meta")),
        ValueError,
        "proxy_logits is on meta, expected the device of base_logits, cpu",
    ),
    # rules
    "unknown rule": (
        lambda: mask(rule="greedy"),
        ValueError,
        "rule is 'greedy', expected one of knapsack, threshold",
    ),
    "rule of another type": (
        lambda: mask(rule=["knapsack"]),
        ValueError,
        "rule is ['knapsack'], expected one of knapsack",
    ),
    "unknown policy": (
        lambda: mask(critical="drop"),
        ValueError,
        "critical is 'drop', expected one of exclude, include, split",
    ),
    "propose with q": (
        lambda: propose(rule="confidence_bet"),
        ValueError,
        "rule is 'confidence_bet', which needs proxy_logits; deferral_propose accepts knapsack, "
        "threshold, nudging, relative, argmax",
    ),
    "mask without q": (
        lambda: mask(rule="proxy_above"),
        ValueError,
        "rule is 'proxy_above', which needs proxy_logits",
    ),
    "negative budget": (
        lambda: mask(param=-0.1),
        ValueError,
        "param is -0.1, expected a budget >= 0 for rule 'knapsack'",
    ),
    "budget NaN": (lambda: mask(param=float("nan")), ValueError, "param is nan, expected a budget"),
    "threshold NaN": (
        lambda: sample(param=float("nan")),
        ValueError,
        "param is nan, expected a number for rule 'threshold'",
    ),
    "no param": (
        lambda: mask(param=None),
        ValueError,
        "param is None, expected a number for rule 'knapsack'",
    ),
    "param for argmax": (
        lambda: mask(rule="argmax", param=0.1),
        ValueError,
        "param is 0.1, expected None for rule 'argmax'",
    ),
    "param of another type": (
        lambda: mask(param="0.3"),
        TypeError,
        "param is '0.3', expected a number or a float64 tensor",
    ),
    "param float32": (
        lambda: mask(param=torch.tensor([0.3])),
        TypeError,
        "param has dtype torch.float32, expected torch.float64",
    ),
    "param shape": (
        lambda: mask(param=doubles(0.1, 0.2)),
        ValueError,
        "param has shape [2], expected one element or [3]",
    ),
    "temperature 0": (
        lambda: mask(temperature=0.0),
        ValueError,
        "temperature is 0.0, expected a positive finite number between",
    ),
    "temperature negative": (lambda: draw(temperature=-1.0), ValueError, "temperature is -1.0"),
    "temperature inf": (lambda: mask(temperature=float("inf")), ValueError, "temperature is inf"),
    "temperature NaN": (lambda: mask(temperature=float("nan")), ValueError, "temperature is nan"),
    "temperature tiny": (lambda: mask(temperature=1e-39), ValueError, "temperature is 1e-39"),
    "temperature huge": (lambda: mask(temperature=1e38), ValueError, "temperature is 1e+38"),
    "rule temperature": (
        lambda: mask(rule_temperature=0.0),
        ValueError,
        "rule_temperature is 0.0, expected a positive",
    ),
    # keys
    "no seed": (
        lambda: sample(seed=None),
        TypeError,
        "seed is None, expected an int or an int64 tensor to draw with",
    ),
    "no position": (lambda: sample(position=None), TypeError, "position is None"),
    "seed float": (lambda: sample(seed=1.0), TypeError, "seed is 1.0, expected an int"),
    "seed range": (
        lambda: sample(seed=2**64),
        ValueError,
        "seed is 18446744073709551616, expected -2**63 <= seed < 2**64",
    ),
    "seed dtype": (
        lambda: sample(seed=torch.tensor(1, dtype=torch.int32)),
        TypeError,
        "seed has dtype torch.int32, expected torch.int64",
    ),
    "seed shape": (lambda: sample(seed=ids(1, 2)), ValueError, "seed has shape [2], expected one"),
    "generator": (
        lambda: sample(seed=torch.Generator()),
        TypeError,
        "seed is a torch.Generator, expected tta_ext.rng.seed_from_generator of it",
    ),
    "position range": (
        lambda: sample(position=-1),
        ValueError,
        "position is -1, expected 0 <= position < 2**32",
    ),
    "position dtype": (
        lambda: sample(position=torch.zeros(B)),
        TypeError,
        "position has dtype torch.float32, expected torch.int64",
    ),
    "position shape": (
        lambda: sample(position=ids(1, 2)),
        ValueError,
        "position has shape [2], expected one element or [3]",
    ),
    "sequence range": (
        lambda: sample(sequence=2**32),
        ValueError,
        "sequence is 4294967296, expected 0 <= sequence < 2**32",
    ),
    "iteration range": (
        lambda: sample(iteration=4096),
        ValueError,
        "iteration is 4096, expected 0 <= iteration < 4096",
    ),
    "rollout range": (
        lambda: sample(rollout=-1),
        ValueError,
        "rollout is -1, expected 0 <= rollout < 65536",
    ),
    "stream": (lambda: draw(stream=10), ValueError, "stream is 10, expected one of BASE=0"),
    "draw number": (lambda: draw(draw=-1), ValueError, "draw is -1, expected 0 <= draw < 2**32"),
    # outputs
    "out count": (
        lambda: sample(out=(ids(0, 0, 0),)),
        ValueError,
        "out has 1 tensors, expected 2: token, deferred",
    ),
    "out dtype": (
        lambda: sample(out=(ids(0, 0, 0), ids(0, 0, 0))),
        ValueError,
        "out.deferred is a tensor of shape [3], torch.int64, on cpu, expected shape [3], "
        "torch.bool",
    ),
    "out shape": (
        lambda: draw(out=ids(0)),
        ValueError,
        "out is a tensor of shape [1], torch.int64, on cpu, expected shape [3], torch.int64",
    ),
    "out strided": (
        lambda: draw(out=torch.zeros(B, 2, dtype=torch.int64)[:, 0]),
        ValueError,
        "out is not contiguous, expected a contiguous tensor",
    ),
    # verification
    "verify dims": (
        lambda: verify(base_logits=good()),
        ValueError,
        "base_logits has shape [3, 8], expected [B, K+1, V]",
    ),
    "verify positions": (
        lambda: verify(proxy_logits=torch.zeros(B, 1, V)),
        ValueError,
        "proxy_logits has shape [3, 1, 8], expected [3, 2 or 3, 8]",
    ),
    "verify draft": (
        lambda: verify(draft=torch.zeros(B, 3, dtype=torch.int64)),
        ValueError,
        "draft has shape [3, 3], expected [3, 2]",
    ),
    "verify draft dtype": (
        lambda: verify(draft=torch.zeros(B, 2)),
        TypeError,
        "draft has dtype torch.float32, expected torch.int64",
    ),
    "verify lengths": (
        lambda: verify(draft_length=ids(1)),
        ValueError,
        "draft_length has shape [1], expected [3]",
    ),
    "verify rule that needs q": (
        lambda: verify(rule="confidence_bet", proxy_logits=torch.zeros(B, 2, V)),
        ValueError,
        "proxy_logits has 2 positions, expected 3 for rule 'confidence_bet'",
    ),
    "verify param": (
        lambda: verify(param=torch.zeros(B, 2, dtype=torch.float64)),
        ValueError,
        "param has shape [3, 2], expected one element or [3] or [3, 3]",
    ),
    # implicit reward
    "expert shape": (
        lambda: reward(expert=torch.zeros(2, B, V + 1)),
        ValueError,
        "expert_logits has shape [2, 3, 9], expected [2, 3, 8]",
    ),
    "anti count": (
        lambda: reward(anti=torch.zeros(1, B, V)),
        ValueError,
        "anti_logits has shape [1, 3, 8], expected [2, 3, 8]",
    ),
    "no expert": (
        lambda: reward(expert=torch.zeros(0, B, V), anti=None),
        ValueError,
        "expert_logits has shape [0, 3, 8], expected E >= 1",
    ),
    "beta shape": (lambda: reward(beta=[1.0]), ValueError, "beta has shape [1], expected [2]"),
    "beta dtype": (
        lambda: reward(beta=doubles(1, 1)),
        TypeError,
        "beta has dtype torch.float64, expected torch.float32",
    ),
    # knapsack
    "profit dtype": (
        lambda: knapsack(profit=torch.ones(B, V).half()),
        TypeError,
        "profit has dtype torch.float16, expected torch.float32",
    ),
    "weight shape": (
        lambda: knapsack(weight=torch.ones(B, V + 1)),
        ValueError,
        "weight has shape [3, 9], expected that of profit, [3, 8]",
    ),
    "capacity": (
        lambda: knapsack(capacity=-1.0),
        ValueError,
        "capacity is -1.0, expected a capacity >= 0",
    ),
    "capacity shape": (
        lambda: knapsack(capacity=doubles(1, 2)),
        ValueError,
        "capacity has shape [2], expected one element or [3]",
    ),
    # random numbers
    "philox counter": (
        lambda: ops.philox(ids(1, 2, 3), ids(1, 2)),
        ValueError,
        "counter has shape [3], expected [..., 4]",
    ),
    "philox key": (
        lambda: ops.philox(ids(1, 2, 3, 4), ids(1)),
        ValueError,
        "key has shape [1], expected [2]",
    ),
    "philox dtype": (
        lambda: ops.philox(torch.zeros(4), ids(1, 2)),
        TypeError,
        "counter has dtype torch.float32, expected torch.int64",
    ),
    "normal n": (lambda: ops.normal(-1, seed=0), ValueError, "n is -1, expected 0 <= n < 2**32"),
    "normal large n": (
        lambda: ops.normal(2**64, seed=0),
        ValueError,
        "n is 18446744073709551616, expected 0 <= n < 2**32",
    ),
    "normal rollout": (
        lambda: ops.normal(1, seed=0, rollout=65536),
        ValueError,
        "rollout is 65536, expected 0 <= rollout < 65536",
    ),
    # pre-logits
    "mean shape": (
        lambda: perturb(mean=torch.zeros(2, 4, V + 1)),
        ValueError,
        "mean has shape [2, 4, 9], expected [P, tau, 8]",
    ),
    "mean dtype": (
        lambda: perturb(mean=torch.zeros(2, 4, V).half()),
        TypeError,
        "mean has dtype torch.float16, expected torch.float32",
    ),
    "row range": (lambda: perturb(row=2), ValueError, "row is 2, expected 0 <= row < 2"),
    "rollout number": (
        lambda: perturb(rollout=65536),
        ValueError,
        "rollout is 65536, expected 0 <= rollout < 65536",
    ),
    "sigma": (
        lambda: perturb(sigma=-0.5),
        ValueError,
        "sigma is -0.5, expected a finite number >= 0",
    ),
    "dot dtype": (
        lambda: perturb(dot=torch.zeros(B, dtype=torch.float64)),
        TypeError,
        "dot has dtype torch.float64, expected torch.float32",
    ),
    "weights lambda": (
        lambda: weights(lam=-1.0),
        ValueError,
        "lam is -1.0, expected a finite number >= 0",
    ),
    "weights alpha": (
        lambda: weights(alpha=1.5),
        ValueError,
        "alpha is 1.5, expected 0 <= alpha <= 1",
    ),
    "weights shapes": (
        lambda: weights(dot=torch.zeros(2, 5)),
        ValueError,
        "dot has shape [2, 5], expected that of reward, [2, 4]",
    ),
    "update weights": (
        lambda: update(weights=torch.zeros(3, 5)),
        ValueError,
        "weights has shape [3, 5], expected [2, n]",
    ),
    "update rollouts": (
        lambda: update(rollouts=(1, 3)),
        ValueError,
        "rollouts is (1, 3), expected (start, stop) with 0 <= start < stop <= 8",
    ),
    "update length": (
        lambda: update(length=torch.zeros(2, 5)),
        TypeError,
        "length has dtype torch.float32, expected torch.int64",
    ),
    "merge count": (
        lambda: ops.control_merge(torch.zeros(2, 4, V), torch.zeros(3, 2, 4, V), 1.0),
        ValueError,
        "partials has shape [3, 2, 4, 8], expected [S, P, tau, d] with S a power of two",
    ),
}


@pytest.mark.parametrize("case", STATIC.values(), ids=STATIC)
def test_arguments(case: Case) -> None:
    call, kind, text = case
    with pytest.raises(kind, match=re.escape(text)):
        call()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", STATIC.values(), ids=STATIC)
def test_what_is_left_to_the_kernel_is_worded_alike(case: Case) -> None:
    call, kind, _ = case
    with pytest.raises(kind) as default:
        call()
    with use_backend("cpu"), pytest.raises(kind) as checked:  # nothing is left to it
        call()
    assert str(default.value) == str(checked.value)

"""Inputs that the tests share: the case grid, language-model-like rows, arguments of every op."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta_ext import rules
from tta_ext.rules import RULE_NAMES

BATCHES = (0, 1, 3, 64)
VOCABULARIES = (1, 127, 32000, 50257, 128256, 151936)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "strided")
CONTENTS = ("model", "ties", "impossible", "peaked")

# Parameters that neither keep everything nor defer everything on the rows made here.
PARAMS: dict[str, tuple[float | None, ...]] = {
    "knapsack": (0.0, 0.3, 1.0),
    "threshold": (0.05, 0.4),
    "confidence_bet": (0.1, -0.1),
    "nudging": (0.4,),
    "relative": (0.2,),
    "argmax": (None,),
    "proxy_below": (-0.3,),
    "proxy_above": (-0.2,),
    "relative_ratio": (0.3, 0.9),
    "optimal": (0.1, -0.2),
}
CRITICALS = ("exclude", "include", "split")
P_ONLY = tuple(n for i, n in enumerate(RULE_NAMES) if i not in rules.NEEDS_PROXY)


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    batch: int
    vocabulary: int
    dtype: torch.dtype
    layout: str
    content: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.vocabulary}-{dtype}-{self.layout}-{self.content}"


def grid() -> Iterator[Case]:
    """Every value of every axis, in most combinations where they are cheap.

    Small vocabularies are crossed fully but for the layouts, of which each meets every triple of
    the other values. Of the large ones each meets each dtype, batch, layout and content somewhere,
    with at most four rows: the row, not the batch, is what is large.
    """
    axes = BATCHES, (1, 127), DTYPES, CONTENTS
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        batch, vocabulary, dtype, content = (axis[i] for axis, i in zip(axes, places, strict=True))
        yield Case(batch, vocabulary, dtype, LAYOUTS[sum(places) % 2], content)
    for turn, (vocabulary, dtype) in enumerate(itertools.product(VOCABULARIES[2:], DTYPES)):
        yield Case((1, 3)[turn % 2], vocabulary, dtype, LAYOUTS[turn // 2 % 2], CONTENTS[turn % 4])


def full_grid() -> Iterator[Case]:
    """All combinations, for the slow tests; of large batches of large rows, one a vocabulary."""
    for point in itertools.product(BATCHES, VOCABULARIES, DTYPES, LAYOUTS, CONTENTS):
        case = Case(*point)
        plain = case.dtype == torch.float32 and case.layout == "strided" and case.content == "ties"
        if case.batch < 64 or case.vocabulary <= 127 or plain:
            yield case


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(case: Case, seed: int = 0) -> Tensor:
    """Logits of a case; equal cases and seeds give equal logits."""
    g = generator(seed * 1000003 + case.batch * 7919 + case.vocabulary)
    shape = (case.batch, case.vocabulary)
    logits = torch.randn(shape, generator=g) * 2.5
    if case.content == "ties":
        logits = (logits * 2).round() / 2
    elif case.content == "impossible":
        gone = torch.rand(shape, generator=g) < 0.4
        gone[:, seed % case.vocabulary] = False
        logits[gone] = -torch.inf
    elif case.content == "peaked":
        logits = logits * 4
    if case.content == "model" and case.vocabulary > 1:
        # A few likely tokens over a long tail, as a language model gives.
        top = torch.randint(0, case.vocabulary, (case.batch, 4), generator=g)
        logits.scatter_(1, top, torch.tensor([14.0, 13.0, 12.0, 10.0]).expand(case.batch, 4))
    logits = logits.to(case.dtype)
    if case.layout == "strided":
        wide = torch.full((case.batch, case.vocabulary + 13), torch.nan, dtype=case.dtype)
        wide[:, 5 : 5 + case.vocabulary] = logits
        logits = wide[:, 5 : 5 + case.vocabulary]
    return logits


def rule_cases() -> Iterator[dict[str, Any]]:
    """Rule arguments: every rule, parameter and policy, and a rule temperature."""
    for rule, params in PARAMS.items():
        for param in params:
            for critical in CRITICALS if rule == "knapsack" else CRITICALS[:1]:
                yield {"rule": rule, "param": param, "critical": critical}
    yield {"rule": "knapsack", "param": 0.3, "rule_temperature": 0.5, "temperature": 1.3}
    yield {"rule": "threshold", "param": 0.3, "rule_temperature": 2.0, "temperature": 0.7}


def rule_id(kwargs: dict[str, Any]) -> str:
    return "-".join(str(v) for v in kwargs.values())


def operator_arguments(name: str, *, requires_grad: bool = False) -> tuple[Any, ...]:
    """Valid arguments of ``torch.ops.tta_ext.<name>``; small."""
    g = generator(11)

    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(requires_grad)

    def index(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    b, v, k, p, n, tau, d = 3, 37, 2, 2, 5, 4, 6
    rule = (torch.tensor([0.3], dtype=torch.float64), rules.KNAPSACK, rules.SPLIT, 1.0, 0.8)
    key = (index(5), index(7, 8, 9), index(0, 1, 2), 1, index(2, 0, 5), True)
    reward_models = (real(b, v), real(2, b, v), real(2, b, v), real(2), 0.9)
    per_rollout = (index(0, 1, 3), index(0, 1, 0), index(4, 5, 4), index(0, 1, 2))
    table: dict[str, tuple[Any, ...]] = {
        "deferral_mask": (real(b, v), None, *rule, True),
        "deferral_probs": (real(b, v), real(b, v), *rule, True),
        "deferral_stats": (real(b, v), real(b, v), *rule, True),
        "deferral_propose": (real(b, v), *rule, *key, True),
        "deferral_sample": (real(b, v), real(b, v), *rule, *key, True),
        "deferral_verify": (
            real(b, k + 1, v),
            real(b, k + 1, v),
            torch.randint(0, v, (b, k), generator=g),
            index(0, 1, 2),
            *rule,
            *key,
            True,
            True,
        ),
        "implicit_reward_probs": (*reward_models, True),
        "implicit_reward_sample": (*reward_models, *key, True),
        "categorical_sample": (real(b, v), 0.7, *key, 1, 3, True),
        "greedy_knapsack": (
            torch.rand(b, v, generator=g).requires_grad_(requires_grad),
            torch.rand(b, v, generator=g).requires_grad_(requires_grad),
            torch.tensor([3.0], dtype=torch.float64),
            True,
        ),
        "prelogit_perturb": (real(3, d), real(p, tau, d), *per_rollout, 1, 0.5, index(5), True),
        "importance_weights": (real(p, n), real(p, n), real(p, n), 0.3, 0.9, 0.5, True),
        "control_update": (
            real(p, tau, d),
            real(p, n),
            torch.full((p, n), 3, dtype=torch.int64),
            index(5),
            index(0, 1),
            1,
            0.5,
            0,
            8,
            False,
            True,
        ),
        "control_merge": (real(p, tau, d), real(4, p, tau, d), 0.5),
        "philox": (torch.arange(12, dtype=torch.int64).reshape(3, 4), index(1, 2)),
        "normal": (10, index(5), 1, 2, 3, 4),
    }
    return table[name]


def operator_outputs(name: str, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """Tensors for the ``.out`` form."""
    from tta_ext.schemas import OPS

    spec = OPS[name]
    return dict(zip(spec.outputs, spec.allocate(*arguments), strict=True))

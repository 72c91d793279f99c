"""Native kernels give the same bits on every instruction set, thread count, batch and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CRITICALS, DTYPES, P_ONLY, RULE_NAMES, Case, generator, rows
from torch import Tensor

import tta_ext
from tta_ext import ops, rng

pytestmark = pytest.mark.usefixtures("native")

Outputs = dict[str, Tensor]

# Several tiles with a ragged end, one tile, part of a vector, a single element.
VOCABULARIES = (20011, 4096, 37, 1)
PARAM = {
    "knapsack": 0.3,
    "threshold": 0.01,
    "confidence_bet": 0.05,
    "nudging": 0.4,
    "relative": 0.3,
    "argmax": None,
    "proxy_below": -0.2,
    "proxy_above": -0.2,
    "relative_ratio": 0.6,
    "optimal": -0.1,
}


@pytest.fixture(autouse=True)
def _native_backend(native: None) -> Iterator[None]:
    with tta_ext.use_backend("cpu"):
        yield


def same_bits(one: Outputs, other: Outputs) -> None:
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        raw = {4: torch.int32, 8: torch.int64, 2: torch.int16, 1: torch.uint8}[a.element_size()]
        assert torch.equal(a.contiguous().view(raw), b.contiguous().view(raw)), name


def key_of(ids: Tensor) -> dict[str, Any]:
    return {"seed": 77, "position": ids + 5, "sequence": ids, "iteration": 2, "rollout": ids + 3}


def deferral_outputs(base: Tensor, proxy: Tensor, ids: Tensor) -> Outputs:
    """All deferral operators under all rules; ids name the rows."""
    found: Outputs = {}

    def add(name: str, result: Any) -> None:
        for i, t in enumerate(result if isinstance(result, tuple) else (result,)):
            found[f"{name}.{i}"] = t

    for rule in RULE_NAMES:
        for critical in CRITICALS if rule == "knapsack" else CRITICALS[:1]:
            kwargs: dict[str, Any] = {
                "rule": rule,
                "param": PARAM[rule],
                "critical": critical,
                "temperature": 0.9,
                "rule_temperature": 1.2 if critical == "split" else None,
            }
            tag = f"{rule}.{critical}"
            add(f"mask.{tag}", ops.deferral_mask(base, proxy, **kwargs))
            add(f"probs.{tag}", ops.deferral_probs(base, proxy, **kwargs))
            add(f"stats.{tag}", ops.deferral_stats(base, proxy, **kwargs))
            add(f"sample.{tag}", ops.deferral_sample(base, proxy, **kwargs, **key_of(ids)))
            add(f"greedy.{tag}", ops.deferral_sample(base, proxy, **kwargs, do_sample=False))
            if rule in P_ONLY:
                add(f"propose.{tag}", ops.deferral_propose(base, **kwargs, **key_of(ids)))
                add(f"lead.{tag}", ops.deferral_propose(base, **kwargs, do_sample=False))
    return found


def sampling_outputs(base: Tensor, proxy: Tensor, ids: Tensor) -> Outputs:
    beta = torch.tensor([0.7, -0.4])
    # A one-sided -inf would be invalid for one of the signs; the base keeps its own.
    one, other = proxy.nan_to_num(neginf=-9.0), base.nan_to_num(neginf=-9.0)
    experts, antis = torch.stack((one, other)), torch.stack((other, one))
    return {
        "categorical": ops.categorical_sample(base, temperature=0.8, draw=4, **key_of(ids)),
        "argmax": ops.categorical_sample(base, do_sample=False),
        "implicit": ops.implicit_reward_probs(base, experts, antis, beta, temperature=1.1),
        "implicit_token": ops.implicit_reward_sample(
            base, experts, antis, beta, temperature=1.1, **key_of(ids)
        ),
        "ensemble": ops.implicit_reward_probs(base, experts, None, beta.abs()),
    }


def knapsack_outputs(base: Tensor, proxy: Tensor, ids: Tensor) -> Outputs:
    profit = base.float().nan_to_num(neginf=0.0).abs()
    weight = proxy.float().nan_to_num(neginf=0.0).abs().round(decimals=1)
    capacity = (weight.double().sum(-1) * 0.3).clamp(min=0.5)
    return dict(zip("abcde", ops.greedy_knapsack(profit, weight, capacity), strict=True))


def verify_outputs(base: Tensor, proxy: Tensor, ids: Tensor) -> Outputs:
    """Each row of the inputs becomes one position of a draft with three tokens."""
    cube, other = base.unsqueeze(1).expand(-1, 4, -1), proxy.unsqueeze(1).expand(-1, 4, -1)
    found: Outputs = {}
    for rule in RULE_NAMES:
        for sample in (True, False):
            kwargs: dict[str, Any] = {"rule": rule, "param": PARAM[rule], "critical": "split"}
            # argmax is what a greedy drafter gives; other tokens are drawn
            if sample:
                drawn = [
                    ops.categorical_sample(proxy, stream=rng.DRAFT, draw=d, **key_of(ids))
                    for d in range(3)
                ]
            else:
                drawn = [ops.categorical_sample(proxy, do_sample=False)] * 3
            lengths = ids % 4
            result = ops.deferral_verify(
                cube,
                other,
                torch.stack(drawn, 1),
                lengths,
                do_sample=sample,
                **kwargs,
                **key_of(ids),
            )
            for name, t in zip(result._fields, result, strict=True):
                found[f"{rule}.{sample}.{name}"] = t
    return found


FAMILIES: dict[str, Callable[[Tensor, Tensor, Tensor], Outputs]] = {
    "deferral": deferral_outputs,
    "sampling": sampling_outputs,
    "knapsack": knapsack_outputs,
    "verify": verify_outputs,
}
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def skip_missing(family: str) -> None:
    from tta_ext.dispatch import has_kernel

    if family == "verify" and not has_kernel("deferral_verify", "cpu"):
        pytest.skip("no compiled deferral_verify")


def inputs(vocabulary: int, dtype: torch.dtype, content: str, batch: int = 5) -> tuple[Tensor, ...]:
    case = Case(batch, vocabulary, dtype, "contiguous", content)
    return rows(case, 0), rows(case, 1), torch.arange(batch)


def in_turn(family: str) -> list[tuple[int, torch.dtype, str]]:
    contents = ("model", "ties", "impossible", "peaked")
    combos = [(v, d) for v in VOCABULARIES for d in DTYPES]
    return [(v, d, contents[i % 4]) for i, (v, d) in enumerate(combos)]


_scalar: dict[Any, Outputs] = {}


@families
def test_instruction_sets(family: str, isa: str) -> None:
    skip_missing(family)
    for vocabulary, dtype, content in in_turn(family):
        found = FAMILIES[family](*inputs(vocabulary, dtype, content))
        point = (family, vocabulary, dtype, content)
        if isa == "scalar":
            _scalar[point] = found
        elif point in _scalar:
            same_bits(_scalar[point], found)
        else:
            level = torch.ops.tta_ext.cpu_isa(-1)
            torch.ops.tta_ext.cpu_isa(0)
            same_bits(FAMILIES[family](*inputs(vocabulary, dtype, content)), found)
            torch.ops.tta_ext.cpu_isa(level)


@families
def test_threads(family: str) -> None:
    skip_missing(family)
    for vocabulary, dtype, content in in_turn(family):
        base, proxy, ids = inputs(vocabulary, dtype, content, batch=9)
        one = FAMILIES[family](base, proxy, ids)
        torch.set_num_threads(2)
        two = FAMILIES[family](base, proxy, ids)
        torch.set_num_threads(1)
        same_bits(one, two)


@families
def test_rows_alone_and_in_any_order(family: str) -> None:
    skip_missing(family)
    for vocabulary, dtype, content in in_turn(family):
        base, proxy, ids = inputs(vocabulary, dtype, content)
        whole = FAMILIES[family](base, proxy, ids)

        def part(name: str, t: Tensor, index: Tensor, batch: int = len(ids)) -> Tensor:
            return t[index] if t.shape[0] == batch else t

        backwards = ids.flip(0)
        turned = FAMILIES[family](base[backwards], proxy[backwards], backwards)
        same_bits({n: part(n, t, backwards) for n, t in whole.items()}, turned)
        for b in range(len(ids)):
            alone = FAMILIES[family](base[b : b + 1], proxy[b : b + 1], ids[b : b + 1])
            same_bits({n: part(n, t, ids[b : b + 1]) for n, t in whole.items()}, alone)


@families
def test_strides(family: str) -> None:
    """Any row stride and any alignment of the first element."""
    skip_missing(family)
    for vocabulary, dtype, content in in_turn(family):
        base, proxy, ids = inputs(vocabulary, dtype, content)
        want = FAMILIES[family](base, proxy, ids)
        for offset in (0, 1, 3):
            found = FAMILIES[family](spread(base, offset), spread(proxy, offset + 1), ids)
            same_bits(want, found)


def spread(x: Tensor, offset: int) -> Tensor:
    """The same rows inside a wider tensor full of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 11), torch.nan, dtype=x.dtype)
    wide[:, offset : offset + x.shape[1]] = x
    return wide[:, offset : offset + x.shape[1]]


def test_flush_denormal_changes_nothing(isa: str) -> None:
    """Rows whose probabilities are subnormal, with the processor's flush-to-zero bit set."""
    base = torch.linspace(0, -110, 4500).repeat(2, 1)
    base[1] = base[1].flip(0)
    proxy = base.flip(1).contiguous()
    tiny = torch.full((1, 40), 1e-40)
    double = tiny * 2
    want = deferral_outputs(base, proxy, torch.arange(2))
    sack = ops.greedy_knapsack(tiny, double, 1e-39)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        found = deferral_outputs(base, proxy, torch.arange(2))
        again = ops.greedy_knapsack(tiny, double, 1e-39)
        subnormal = float(torch.tensor(1e-40) * 1.0)
    finally:
        torch.set_flush_denormal(False)
    assert subnormal == 0.0, "the bit was lost on the way"
    same_bits(want, found)
    same_bits(dict(zip("abcde", sack, strict=True)), dict(zip("abcde", again, strict=True)))


def test_normals(isa: str) -> None:
    want = ops.normal(10007, seed=-3, step=9, sequence=2**32 - 1, iteration=4095, rollout=65535)
    for n in (0, 1, 2, 3, 5, 31, 100):
        short = ops.normal(n, seed=-3, step=9, sequence=2**32 - 1, iteration=4095, rollout=65535)
        assert torch.equal(short, want[:n])
    level = torch.ops.tta_ext.cpu_isa(-1)
    torch.ops.tta_ext.cpu_isa(0)
    scalar = ops.normal(10007, seed=-3, step=9, sequence=2**32 - 1, iteration=4095, rollout=65535)
    torch.ops.tta_ext.cpu_isa(level)
    assert torch.equal(scalar, want)
    torch.set_num_threads(2)
    assert torch.equal(
        ops.normal(10007, seed=-3, step=9, sequence=2**32 - 1, iteration=4095, rollout=65535), want
    )


def prelogit_outputs(dtype: torch.dtype, d: int, spans: list[tuple[int, int]]) -> Outputs:
    """Perturbation in pieces of the batch, weights and update."""
    g = generator(d)
    n, tau, prompts = 6, 5, 2
    mean = torch.randn(prompts, tau, d, generator=g)
    hidden = torch.randn(prompts * n, d, generator=g).to(dtype)
    row = torch.arange(prompts * n) // n
    dot = torch.zeros(prompts * n)
    perturbed = []
    for t in range(tau + 1):
        parts = [
            ops.prelogit_perturb(
                hidden[a:b],
                mean,
                step=t,
                row=row[a:b],
                sequence=row[a:b] + 11,
                rollout=(torch.arange(prompts * n) % n)[a:b],
                iteration=3,
                sigma=0.37,
                seed=12,
                dot=dot[a:b],
            )
            for a, b in spans
        ]
        perturbed.append(torch.cat(parts))
    norm2 = mean.square().sum((1, 2)).unsqueeze(1).expand(prompts, n).contiguous()
    reward = torch.randn(prompts, n, generator=g)
    weights = ops.importance_weights(
        reward, dot.reshape(prompts, n), norm2, lam=0.4, alpha=0.95, sigma=0.37
    )
    length = torch.arange(prompts * n).reshape(prompts, n) % (tau + 2)
    common: dict[str, Any] = {
        "sigma": 0.37,
        "seed": 12,
        "iteration": 3,
        "sequence": torch.tensor([11, 12]),
        "length": length,
    }
    new = ops.control_update(mean, weights.w, **common)
    shards = {}
    for size in (1, 2, 4, 8):
        parts = [
            ops.control_update(mean, weights.w, rollouts=(s, s + size), **common)
            for s in range(0, 8, size)
        ]
        shards[f"merged{size}"] = ops.control_merge(mean, torch.stack(parts), 0.37)
    for merged in shards.values():
        assert torch.equal(merged, new)
    return {
        "hidden": torch.stack(perturbed),
        "dot": dot,
        "weights": weights.w,
        "ess": weights.ess,
        "mean": new,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 6, 576, 4100])
def test_prelogit_family(dtype: torch.dtype, d: int, isa: str) -> None:
    from tta_ext.dispatch import has_kernel

    if not has_kernel("control_update", "cpu"):
        pytest.skip("no compiled prelogit kernels")
    whole = [(0, 12)]
    found = prelogit_outputs(dtype, d, whole)
    same_bits(found, prelogit_outputs(dtype, d, [(0, 1), (1, 7), (7, 12)]))
    torch.set_num_threads(2)
    same_bits(found, prelogit_outputs(dtype, d, whole))
    torch.set_num_threads(1)
    level = torch.ops.tta_ext.cpu_isa(-1)
    torch.ops.tta_ext.cpu_isa(0)
    scalar = prelogit_outputs(dtype, d, whole)
    torch.ops.tta_ext.cpu_isa(level)
    same_bits(scalar, found)


def test_largest_vocabulary(native: None) -> None:
    """2^20 tokens: every instruction set agrees, and the knapsack keeps its budget."""
    g = torch.Generator().manual_seed(9)
    base = torch.randn(1, 1 << 20, generator=g) * 3
    proxy = torch.randn(1, 1 << 20, generator=g) * 3
    found = []
    before = torch.ops.tta_ext.cpu_isa(-1)
    try:
        for level in range(before + 1):
            torch.ops.tta_ext.cpu_isa(level)
            rule = {"rule": "knapsack", "param": 0.3}
            mask = ops.deferral_mask(base, **rule)
            drawn = ops.deferral_sample(base, proxy, **rule, seed=2, position=0)
            packed = ops.greedy_knapsack(proxy.abs(), base.abs(), 1e5)
            found.append((*mask, *drawn, *packed))
    finally:
        torch.ops.tta_ext.cpu_isa(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
    mask = ops.Mask(*found[0][:3])
    p = torch.softmax(base.double(), -1)
    used, critical = p[mask.mask].sum(), p[0, mask.critical[0]]
    assert 0.3 - critical < used <= 0.3 * (1 + 2**-20)

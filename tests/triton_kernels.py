"""The Triton kernels, run by Triton's interpreter, against the CPU's kernels, bit for bit.

``tests/test_triton.py`` runs this file in processes of its own, under ``TRITON_INTERPRET=1``:
Triton reads that when it is imported, and every kernel of the process is then interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import triton.language as tl
from cases import operator_outputs
from torch import Tensor
from triton.runtime import interpreter

import tta_ext
from tta_ext import ops, rng, rules
from tta_ext.backends import triton

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of what IEEE defines
]
INF, NAN = float("inf"), float("nan")
PARAMS = dict(
    zip(rules.RULE_NAMES, (0.3, 0.02, 0.05, 0.3, 0.01, None, -0.005, 0.001, 0.4, 0.02), strict=True)
)


@pytest.fixture(scope="module", autouse=True)
def _patched_once() -> Iterator[None]:
    """A kernel patches Triton's language, and so does each function that it calls, in vain: that
    takes three quarters of the time.
    """
    patch = interpreter._patch_lang

    def once(function: Any) -> Any:
        fresh = any(tl.core.is_builtin(module.load) for module in (tl, tl.core))
        return patch(function) if fresh else None

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", once)
        yield


def agree(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the CPU's kernels return, which must be what Triton's return, to the bit."""
    with tta_ext.use_backend("cpu"):
        wanted = call(*args, **options)
    with tta_ext.use_backend("triton"):
        found = call(*args, **options)
    single = isinstance(wanted, Tensor)
    for a, b in zip((wanted,) if single else wanted, (found,) if single else found, strict=True):
        assert a.dtype == b.dtype
        different = (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()
        assert not different, f"{a.flatten()[:8].tolist()} became {b.flatten()[:8].tolist()}"
    return wanted


def logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows with ties, impossible tokens, one with a NaN (the last) and one of -inf alone."""
    generator = torch.Generator().manual_seed(seed + vocab)
    x = 3 * torch.randn(rows, vocab + 3, generator=generator)
    x = x.to(dtype)[:, :vocab]  # rows that do not follow each other without a gap
    x[0, vocab // 2 :] = x[0, : vocab - vocab // 2].clone()
    if rows > 2 and vocab > 3:
        x[1, ::3] = -INF
        x[-1, vocab // 2] = NAN
    if rows > 3:
        x[-2] = -INF
    return x


def key(rows: int) -> dict[str, Any]:
    return {
        "seed": -(2**40) - 7,
        "position": 5 * torch.arange(rows) + 2**31,
        "sequence": torch.arange(rows) + 3,
        "iteration": 5,
        "rollout": torch.arange(rows) + 60000,
    }


def test_philox() -> None:
    answers = agree(ops.philox, torch.tensor([[0] * 4, [-1] * 4]), torch.tensor([0, 0]))
    assert f"{answers[0, 0]:08x} {answers[0, 3]:08x}" == "6627e8d5 9b00dbd8"
    counter = torch.arange(4 * 300).view(3, 100, 4) * 123456789
    agree(ops.philox, counter, torch.tensor([2**32 + 1, -5]))


@pytest.mark.parametrize("n", [0, 1, 3, 1025])
def test_normal(n: int) -> None:
    agree(ops.normal, n, seed=-5, step=2**32 - 1, sequence=3, iteration=4095, rollout=65535)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 130, 4301])
def test_categorical_sample(vocab: int, dtype: torch.dtype) -> None:
    x = logits(2 if vocab > 4096 else 4, vocab, dtype)
    for sampled in (True, False):
        agree(
            ops.categorical_sample,
            x,
            **key(len(x)),
            do_sample=sampled,
            temperature=0.7,
            stream=rng.USER,
            draw=9,
            check=False,
        )


def test_one_number_for_all_rows() -> None:
    x = logits(2, 40)
    agree(ops.categorical_sample, x, seed=1, position=1, sequence=1, rollout=1)
    agree(ops.categorical_sample, x[:0], seed=1, position=1)


def test_the_whole_range_of_exp() -> None:
    """Weights down to the smallest, and below; a normal one at each."""
    x = torch.linspace(-120, 0, 350).expand(2, 350)
    policy = agree(ops.deferral_probs, x, x, rule="nudging", param=0.0)  # p itself
    assert (policy == 0).any() and (policy > 0).any()


def settings(rule: str) -> list[dict[str, Any]]:
    """A rule's calls: at one temperature and at two, each way with the critical item."""
    ways = ("include", "exclude", "split") if rule == "knapsack" else ("exclude",)
    given = [
        {"rule": rule, "param": PARAMS[rule], "critical": way, "temperature": 0.7} for way in ways
    ]
    return [*given, {**given[-1], "rule_temperature": 1.3}]


@pytest.mark.parametrize("rule", rules.RULE_NAMES)
def test_deferral(rule: str) -> None:
    needs = rules.RULE_NAMES.index(rule) in rules.NEEDS_PROXY
    for i, given in enumerate(settings(rule)):
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)[i]
        x, q = logits(4, 150, dtype), logits(4, 150, seed=7)
        q[1] = q[-1]  # one more row whose proxy is not usable
        proxy = q if needs else None
        agree(ops.deferral_probs, x, q, **given, check=False)
        if i % 2 == 0:
            agree(ops.deferral_mask, x, proxy, **given, check=False)
        if given["critical"] != "include":
            agree(ops.deferral_stats, x, proxy, **given, check=False)
        for sampled in (True, False) if i % 2 == 0 else (True,):
            how = {**given, **key(4), "do_sample": sampled, "check": False}
            agree(ops.deferral_sample, x, q, **how)
            if not needs:
                agree(ops.deferral_propose, x, **how)


@pytest.mark.parametrize("critical", ["exclude", "split"])
def test_a_cut_among_ties_and_tiles(critical: str) -> None:
    """The critical item is one of thousands of equal logits, in the second tile."""
    x = torch.full((2, 4230), -1.0, dtype=torch.bfloat16)
    x[0, 7] = x[1, 4200] = 3.0
    param = torch.tensor([0.98, 0.5], dtype=torch.float64)
    given = {"rule": "knapsack", "param": param, "critical": critical}
    mask = agree(ops.deferral_mask, x, **given)
    assert mask.critical[0] > 4096
    agree(ops.deferral_propose, x, **given, **key(2))


def test_budgets_at_the_ends() -> None:
    x = logits(2, 90)
    for budget in (0.0, 1.0, 7.0):
        agree(ops.deferral_mask, x, rule="knapsack", param=budget)
        agree(ops.deferral_stats, x, rule="knapsack", param=budget)


def verify_case(proxies: int, sampled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Base, proxy and draft of four rows: one unlike, one unusable, two alike."""
    base = logits(12, 60).reshape(4, 3, 60).nan_to_num(0.0)
    base[3] = base[0]
    proxy = base[:, :proxies] + 0.5 * logits(1, 60, seed=3)
    proxy[0, 1] = proxy[0, 1].roll(30)
    base[1, 1, 5] = NAN
    if sampled:
        first = proxy[:, :2].reshape(8, 60)
        position = torch.arange(8)
        draft = ops.categorical_sample(first, seed=2, position=position, stream=rng.DRAFT)
        draft = draft.view(4, 2)
    else:
        draft = proxy[:, :2].argmax(-1)
    draft[3, 0] = 1  # what the proxy could not have drawn
    proxy[3, 0, 1] = -INF
    return base, proxy, draft


@pytest.mark.parametrize("rule", rules.RULE_NAMES)
def test_verify(rule: str) -> None:
    """Drawn drafts and greedy ones, with a proxy's row for the token after them or without."""
    for i, given in enumerate(settings(rule)):
        sampled = i % 2 == 0
        needs = rules.RULE_NAMES.index(rule) in rules.NEEDS_PROXY
        base, proxy, draft = verify_case(3 if needs or i in (0, 3) else 2, sampled)
        length = torch.tensor([2, 2, 0, 1])
        how = {**given, **key(4), "do_sample": sampled, "return_mass": True, "check": False}
        agree(ops.deferral_verify, base, proxy, draft, length, **how)


def test_optimal_where_the_models_are_alike() -> None:
    """A distance of nothing, whose product with infinity is NaN: no row of it is deferred."""
    alike, vocab = 3, 150
    param = torch.tensor([0.0, INF, -0.1, 0.02, INF], dtype=torch.float64)
    x = 3 * torch.randn(len(param), vocab, generator=torch.Generator().manual_seed(5))
    x[2] = (x[2] / 3).round()  # ties, the most probable among them
    q = x.clone()
    q[alike:] = 1.5 * q[alike:].roll(1)
    given: dict[str, Any] = {"rule": "optimal", "param": param, "temperature": 0.7}
    mask = agree(ops.deferral_mask, x, q, **given).mask
    assert mask.all(-1).tolist() == [False] * alike + [True, False]
    agree(ops.deferral_stats, x, q, **given, rule_temperature=1.3)
    for sampled in (True, False):
        how = {**given, **key(len(x)), "do_sample": sampled}
        agree(ops.deferral_sample, x, q, **how)
        for length in (0, 1):
            base, proxy = (y[:, None].expand(-1, length + 1, vocab) for y in (x, q))
            draft, filled = q.argmax(-1, keepdim=True)[:, :length], torch.full((len(x),), length)
            agree(ops.deferral_verify, base, proxy, draft, filled, **how, return_mass=True)


def test_the_distance_of_two_tiles() -> None:
    """Its sum decides: of parameters on both sides of (max q - max p) / TV."""
    x = 3 * torch.randn(1, 4230, generator=torch.Generator().manual_seed(5))
    q = (1.5 * x.roll(1)).expand(2, -1)
    p_, q_ = (y[0].double().softmax(-1) for y in (x, q))
    even = (q_.max() - p_.max()) / (p_ - q_).clamp(min=0).sum()
    param = even + torch.tensor([-1e-6, 1e-6], dtype=torch.float64)
    mask = agree(ops.deferral_mask, x.expand(2, -1), q, rule="optimal", param=param).mask
    assert mask.all(-1).tolist() == [True, False]


@pytest.mark.parametrize("rule", sorted(rules.NEEDS_PROXY))
def test_a_rule_that_reads_the_proxy_is_given_it(rule: int) -> None:
    """The kernels' callers themselves ask, of what ``tta_ext.ops`` would not pass on."""
    x, numbers = torch.zeros(1, 2, 9), [torch.tensor([i]) for i in range(4)]
    given = (torch.tensor([0.1], dtype=torch.float64), rule, rules.EXCLUDE, 1.0, 1.0)
    how = (*numbers[:3], 0, numbers[3], True)
    draft, length = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for name, *arguments in (
        ("deferral_mask", x[0], None, *given),
        ("deferral_propose", x[0], *given, *how),
        ("deferral_verify", x, x[:, :1], draft, length, *given, *how, False),
        ("deferral_verify", x[:, :1], x[:, :0], draft[:, :0], length, *given, *how, False),
    ):
        operands = (*arguments, False)
        wanted = f"rule '{rules.RULE_NAMES[rule]}' needs proxy_logits"
        with pytest.raises(ValueError, match=wanted):
            getattr(triton, name)(*operands, **operator_outputs(name, operands))


def test_verify_where_the_policy_is_the_proxy() -> None:
    """All is deferred: a residual of nothing, and a draft token that q could not have drawn."""
    x, q = logits(2, 60)[:, None].expand(2, 2, 60), logits(2, 60, seed=1)[:, None].clone()
    q[1, 0, 5] = -INF
    draft = torch.tensor([[3], [5]])
    given = {"rule": "nudging", "param": 2.0, **key(2)}
    found = agree(ops.deferral_verify, x, q, draft, torch.tensor([1, 1]), **given)
    assert found.accepted.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contrast", [False, True])
def test_implicit_reward(contrast: bool, dtype: torch.dtype) -> None:
    base, expert = logits(4, 150, dtype), logits(8, 150, dtype, 1).nan_to_num(0.0).view(2, 4, 150)
    anti = logits(8, 150, dtype, 2).nan_to_num(0.0).view(2, 4, 150) if contrast else None
    for beta in ([0.5, 1.5], [0.0, -0.3]):
        given = {"beta": torch.tensor(beta), "temperature": 0.7, "check": False}
        agree(ops.implicit_reward_probs, base, expert, anti, **given)
        for sampled in (True, False):
            how = {**given, **key(4), "do_sample": sampled}
            agree(ops.implicit_reward_sample, base, expert, anti, **how)


def perturbed(hidden: Tensor, mean: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Three rows, the last beyond the horizon; what dot held is added to."""
    dot = torch.ones(3)
    indices = {"step": [0, 3, 4], "row": [0, 1, 1], "sequence": [5, 6, 7], "rollout": [1, 2, 3]}
    given = {name: torch.tensor(values) for name, values in indices.items()}
    out = ops.prelogit_perturb(hidden, mean, **given, iteration=2, sigma=sigma, seed=77, dot=dot)
    return out, dot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prelogit_perturb(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for dim, sigma in ((5, 0.5), (4230, 0.4), (130, 0.0)):
        hidden = torch.randn(3, dim, generator=generator).to(dtype)
        mean = torch.randn(2, 4, dim, generator=generator)
        agree(perturbed, hidden, mean, sigma)


@pytest.mark.parametrize("n", [1, 5, 33, 1100])
def test_importance_weights(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    reward, dot, norm2 = (torch.randn(3, n, generator=generator) for _ in range(3))
    reward[0, n // 2] = -INF if n > 1 else 0.0
    reward[1, 0], dot[2, 0] = NAN, INF
    for lam, sigma in ((0.3, 0.5), (0.0, 0.5), (1e-3, 0.0)):
        given = {"lam": lam, "alpha": 0.9, "sigma": sigma, "check": False}
        agree(ops.importance_weights, reward, dot, norm2, **given)


@pytest.mark.parametrize("n", [1, 5, 16, 40])
def test_control_update(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    mean, weights = (
        torch.randn(2, 2, 20, generator=generator),
        torch.rand(2, n, generator=generator),
    )
    weights[:, 1::3] = 0.0
    given = {"sigma": 0.5, "seed": 5, "iteration": 2, "sequence": torch.tensor([3, 4])}
    agree(ops.control_update, mean, weights, **given)
    length = torch.arange(2 * n).view(2, n) % 3
    agree(ops.control_update, mean, weights, length=length, **given)
    weights[1, 0] = NAN
    agree(ops.control_update, mean, weights, **given, check=False)


def test_an_update_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, weights = (
        torch.randn(1, 2, 150, generator=generator),
        torch.rand(1, 64, generator=generator),
    )
    given = {"sigma": 0.5, "seed": 5, "iteration": 2, "sequence": torch.tensor([3])}
    whole = agree(ops.control_update, mean, weights, **given)
    parts = [
        agree(ops.control_update, mean, weights, rollouts=part, **given)
        for part in ((0, 32), (32, 64))
    ]
    merged = agree(ops.control_merge, mean, torch.stack(parts), 0.5)
    assert torch.equal(whole, merged)


def complaint(call: Callable[[], Any], backend: str) -> str:
    with tta_ext.use_backend(backend), pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.categorical_sample(x, seed=0, position=0),
        lambda x: ops.categorical_sample(x[:1], seed=0, position=torch.tensor([-1, 3])[:1]),
        lambda x: ops.deferral_mask(x, rule="threshold", param=0.3),
        lambda x: ops.deferral_probs(x[:2], x[2:], rule="threshold", param=0.3),
        lambda x: ops.deferral_propose(x, rule="threshold", param=0.3, do_sample=False),
        lambda x: ops.deferral_stats(
            x[:2], rule="knapsack", param=torch.tensor([0.1, NAN], dtype=torch.float64)
        ),
        lambda x: ops.importance_weights(
            x[2:], x[:2].nan_to_num(), x[:2].nan_to_num(), lam=1.0, alpha=1.0, sigma=1.0
        ),
        lambda x: ops.control_update(
            torch.zeros(4, 1, 4), x, sigma=1.0, seed=0, iteration=0, sequence=torch.arange(4)
        ),
    ],
)
def test_errors_are_the_cpus(call: Callable[[Tensor], Any]) -> None:
    x = logits(4, 30)
    assert complaint(lambda: call(x), "triton") == complaint(lambda: call(x), "cpu")


def test_what_triton_has_no_kernel_of_is_the_references() -> None:
    items: Sequence[Tensor] = (
        torch.rand(2, 9),
        torch.rand(2, 9),
        torch.tensor([1.0, 2.0]).double(),
    )
    with tta_ext.use_backend("triton"):
        found = ops.greedy_knapsack(*items)
    with tta_ext.use_backend("reference"):
        assert torch.equal(found.selected, ops.greedy_knapsack(*items).selected)

"""Speculative verification: the output keeps the law pi, token by token and as sequences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import DTYPES, PARAMS, Case, generator, rows, rule_cases, rule_id
from oracle import mixture64, screen64, softmax64, uniform
from test_sampling import chi_square
from torch import Tensor

from benchmarks.acceptance import verified
from tta_ext import ops, rng

DRAWS = 20000
laws = pytest.mark.parametrize("kwargs", list(rule_cases()), ids=rule_id)


def models(positions: int, vocabulary: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small rows, different at every position; some tokens impossible for one of the models."""
    g = generator(seed)
    base = torch.randn(1, positions, vocabulary, generator=g) * 1.5
    proxy = torch.randn(1, positions, vocabulary, generator=g) * 1.5
    base[0, :, 1] = -torch.inf
    proxy[0, :, 2] = -torch.inf
    base[0, :, 4] = base[0, :, 3]
    return base, proxy


def drafted(proxy: Tensor, count: int, temperature: float = 1.0) -> Tensor:
    """Draft tokens from q for ``count`` independent sequences: ``[count, K]``."""
    columns = []
    for k in range(proxy.shape[1] - 1):
        columns.append(
            ops.categorical_sample(
                proxy[:, k].expand(count, -1),
                seed=8,
                position=torch.arange(count) * 16 + k,
                sequence=0,
                stream=rng.DRAFT,
                temperature=temperature,
            )
        )
    return torch.stack(columns, 1)


def verify(base: Tensor, proxy: Tensor, draft: Tensor, **kwargs: Any) -> ops.Verified:
    count = draft.shape[0]
    return ops.deferral_verify(
        base.expand(count, -1, -1),
        proxy.expand(count, -1, -1),
        draft,
        kwargs.pop("draft_length", torch.full((count,), draft.shape[1])),
        seed=8,
        position=torch.arange(count) * 16,
        sequence=0,
        **kwargs,
    )


@laws
def test_output_has_the_law_of_plain_decoding(kwargs: dict[str, Any], backend: str) -> None:
    """Position by position, given what was accepted before it; and acceptance is at least D."""
    base, proxy = models(4)
    temperature = kwargs.get("temperature", 1.0)
    draft = drafted(proxy, DRAWS, temperature)
    got = verify(base, proxy, draft, **kwargs)
    for k in range(4):
        law = ops.deferral_probs(base[:, k], proxy[:, k], **kwargs)[0]
        mass = float(ops.deferral_stats(base[:, k], proxy[:, k], **kwargs).deferred_mass)
        reached = got.accepted >= k
        if int(reached.sum()) < 500:
            continue
        taken = got.accepted > k
        emitted = torch.where(taken, draft[:, min(k, 2)], got.token)[reached]
        assert chi_square(emitted, law) > 1e-4
        if k < 3:
            count = int(reached.sum())
            rate = float(taken[reached].double().mean())
            assert rate >= mass - 4.5 * (mass * (1 - mass) / count) ** 0.5 - 1e-9
        seen = got.mass[reached, k]
        torch.testing.assert_close(seen, torch.full_like(seen, mass), rtol=1e-9, atol=1e-12)
        assert (got.mass[~reached, k] == -1).all()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rule": "knapsack", "param": 0.4, "critical": "split"},
        {"rule": "threshold", "param": 0.25},
        {"rule": "confidence_bet", "param": 0.2},
    ],
    ids=rule_id,
)
def test_sequences_have_the_law_of_plain_decoding(kwargs: dict[str, Any], backend: str) -> None:
    """Three tokens of a Markov model by repeated draft, verify, commit; against the exact law."""
    v, depth, count = 4, 3, 12000
    g = generator(31)
    base_table, proxy_table = torch.randn(v, v, generator=g), torch.randn(v, v, generator=g)
    step_law = ops.deferral_probs(base_table, proxy_table, **kwargs).double()

    tokens = torch.zeros(count, depth + 3, dtype=torch.int64)
    length = torch.zeros(count, dtype=torch.int64)
    last = torch.zeros(count, dtype=torch.int64)
    ids = torch.arange(count)
    for _ in range(depth):
        draft = torch.zeros(count, 2, dtype=torch.int64)
        state, states = last, [last]
        for k in range(2):
            state = ops.categorical_sample(
                proxy_table[state], seed=3, position=length + k, sequence=ids, stream=rng.DRAFT
            )
            draft[:, k] = state
            states.append(state)
        context = torch.stack(states, 1)
        got = ops.deferral_verify(
            base_table[context],
            proxy_table[context],
            draft,
            torch.full((count,), 2),
            seed=3,
            position=length,
            sequence=ids,
            **kwargs,
        )
        for i in range(2):
            keep = (got.accepted > i) & (length + i < depth)
            tokens[keep, (length + i)[keep]] = draft[keep, i]
        place = (length + got.accepted).clamp(max=depth)
        tokens[ids, place] = got.token
        length, last = length + got.accepted + 1, got.token
    assert (length >= depth).all()

    law = torch.zeros(v**depth, dtype=torch.float64)
    for n, path in enumerate(itertools.product(range(v), repeat=depth)):
        probability, state = 1.0, 0
        for token in path:
            probability *= float(step_law[state, token])
            state = token
        law[n] = probability
    codes = (tokens[:, 0] * v + tokens[:, 1]) * v + tokens[:, 2]
    assert chi_square(codes, law) > 1e-4


@laws
def test_decisions_follow_the_definition(kwargs: dict[str, Any], backend: str) -> None:
    """Accept iff r < pi(x) / q(x), away from ties of the two."""
    temperature = kwargs.get("temperature", 1.0)
    base, proxy = models(2, vocabulary=9, seed=4)
    count = 400
    draft = drafted(proxy, count, temperature)
    got = verify(base, proxy, draft, **kwargs)
    mu = screen64(base[:, 0], proxy[:, 0], kwargs).mu
    pi = mixture64(base[:, 0], proxy[:, 0], mu, temperature)[0]
    q = softmax64(proxy[:, 0], temperature)[0]
    for i in range(count):
        x = int(draft[i, 0])
        r = uniform(8, 16 * i, 0, rng.VERIFY)
        ratio = float(pi[x] / q[x])
        if abs(r - ratio) > 1e-5 and ratio < 1 - 1e-5:
            assert bool(got.accepted[i] == 1) == (r < ratio)
        elif ratio >= 1 + 1e-5:
            assert got.accepted[i] == 1


def test_impossible_drafts_are_rejected(backend: str) -> None:
    """q(x) = 0 is rejected whatever pi says, even where pi equals q."""
    base, proxy = models(2)
    draft = torch.full((500, 1), 2)
    for kwargs in ({"param": 0.4}, {"param": 1.0}):
        got = verify(base, proxy, draft, rule="knapsack", **kwargs)
        assert (got.accepted == 0).all()
        assert (got.token >= 0).all()
        assert torch.isfinite((base if kwargs["param"] < 1 else proxy)[0, 0][got.token]).all()


def test_everything_deferred_accepts_everything(backend: str) -> None:
    base, proxy = models(4)
    draft = drafted(proxy, 300)
    got = verify(base, proxy, draft, rule="knapsack", param=1.0)
    assert (got.accepted == 3).all()
    assert got.deferred.all()
    assert torch.equal(got.mass, torch.ones(300, 4, dtype=torch.float64))


def test_identical_models_accept_everything(backend: str) -> None:
    base, _ = models(4)
    got = verify(base, base.clone(), drafted(base, 300), rule="threshold", param=0.0)
    assert (got.accepted == 3).all()


@laws
def test_greedy(kwargs: dict[str, Any], backend: str) -> None:
    """do_sample=False walks along argmax pi."""
    base, proxy = models(4, vocabulary=12, seed=2)
    best = torch.stack(
        [
            ops.deferral_sample(base[:, k], proxy[:, k], do_sample=False, **kwargs).token
            for k in range(4)
        ],
        1,
    )
    flags = [
        bool(ops.deferral_sample(base[:, k], proxy[:, k], do_sample=False, **kwargs).deferred)
        for k in range(4)
    ]
    for wrong in range(4):
        draft = best[:, :3].clone()
        if wrong < 3:
            draft[0, wrong] = (draft[0, wrong] + 1) % 12
        got = verify(base, proxy, draft, do_sample=False, **kwargs)
        assert int(got.accepted) == wrong
        assert int(got.token) == int(best[0, wrong])
        assert bool(got.deferred) == flags[wrong]


def test_greedy_bonus_among_ties_of_probability(backend: str) -> None:
    """Logits that differ where their float32 probabilities do not, and nothing is deferred."""
    base = torch.tensor([[[-3.0, 0.0, 1e-9]], [[0.0, 1.0, 3.0]]])
    none = torch.zeros(2, 0, dtype=torch.int64)
    kwargs: dict[str, Any] = {"rule": "threshold", "param": 0.0, "do_sample": False}
    for proxies, token, deferred in ((1, [1, 2], [False, False]), (0, [-1, 2], [True, False])):
        length = torch.zeros(2, dtype=torch.int64)
        got = ops.deferral_verify(base, base[:, :proxies], none, length, **kwargs)
        assert got.token.tolist() == token
        assert got.deferred.tolist() == deferred


def test_missing_bonus_row_is_left_to_the_caller(backend: str) -> None:
    """With K proxy rows a rejected bonus is -1, and drawing it from q (PROXY) completes it."""
    base, proxy = models(4)
    draft = drafted(proxy, 400)
    for sample in (True, False):
        kwargs: dict[str, Any] = {"rule": "knapsack", "param": 0.4, "do_sample": sample}
        whole = verify(base, proxy, draft, **kwargs)
        part = verify(base, proxy[:, :3], draft, **kwargs)
        assert torch.equal(whole.accepted, part.accepted)
        asked = part.token == -1
        assert torch.equal(whole.token[~asked], part.token[~asked])
        assert part.deferred[asked].all()
        assert (part.accepted[asked] == 3).all()
        if sample:
            assert asked.any()
            assert torch.equal(part.deferred, whole.deferred)
            drawn = ops.categorical_sample(
                proxy[:, 3].expand(400, -1),
                seed=8,
                position=torch.arange(400) * 16 + 3,
                sequence=0,
                stream=rng.PROXY,
            )
            assert torch.equal(drawn[asked], whole.token[asked])


def test_ragged_lengths_equal_single_rows(backend: str) -> None:
    g = generator(5)
    b, k, v = 12, 5, 40
    base, proxy = torch.randn(b, k + 1, v, generator=g), torch.randn(b, k + 1, v, generator=g)
    draft = torch.stack(
        [
            ops.categorical_sample(proxy[:, i], seed=1, position=50 + i, stream=rng.DRAFT)
            for i in range(k)
        ],
        1,
    )
    length = torch.arange(b) % (k + 1)
    params = torch.rand(b, k + 1, dtype=torch.float64, generator=g)
    key: dict[str, Any] = {"seed": 1, "rule": "knapsack", "critical": "split"}
    whole = ops.deferral_verify(base, proxy, draft, length, position=50, param=params, **key)
    for i in range(b):
        n = int(length[i])
        # Entries past the row's length are not read.
        one = ops.deferral_verify(
            base[i : i + 1, : n + 1],
            proxy[i : i + 1, : n + 1],
            draft[i : i + 1, :n],
            length[i : i + 1],
            position=50,
            sequence=i,
            param=params[i : i + 1, : n + 1].contiguous(),
            **key,
        )
        assert int(one.accepted) == int(whole.accepted[i])
        assert int(one.token) == int(whole.token[i])
        assert bool(one.deferred) == bool(whole.deferred[i])
        assert torch.equal(one.mass[0], whole.mass[i, : n + 1])


def test_only_reached_positions_are_read(backend: str) -> None:
    base, proxy = models(4, vocabulary=9)
    draft = drafted(proxy, 200)
    kwargs: dict[str, Any] = {"rule": "threshold", "param": 0.2}
    clean = verify(base, proxy, draft, **kwargs)
    many_base, many_proxy = base.expand(200, -1, -1).clone(), proxy.expand(200, -1, -1).clone()
    draft = draft.clone()
    for i in range(200):
        stop = int(clean.accepted[i])
        many_base[i, stop + 1 :] = torch.nan
        many_proxy[i, stop + 1 :] = torch.inf
    again = verify(many_base, many_proxy, draft, **kwargs)
    assert torch.equal(again.token, clean.token)
    assert torch.equal(again.accepted, clean.accepted)
    row = int((clean.accepted > 0).nonzero()[0])
    many_base[row, 1] = torch.nan
    with pytest.raises(ValueError, match=f"row {row}, position 1 of base_logits has NaN"):
        verify(many_base, many_proxy, draft, **kwargs)
    loose = verify(many_base, many_proxy, draft, check=False, **kwargs)
    assert int(loose.token[row]) == -1
    assert int(loose.accepted[row]) == 1
    assert bool(loose.mass[row, 1].isnan())
    others = torch.arange(200) != row
    assert torch.equal(loose.token[others], clean.token[others])


def test_mass_only_on_request(backend: str) -> None:
    base, proxy = models(4)
    draft = drafted(proxy, 300)
    for rule, params in PARAMS.items():
        with_mass = verify(base, proxy, draft, rule=rule, param=params[-1])
        without = verify(base, proxy, draft, rule=rule, param=params[-1], return_mass=False)
        assert (without.mass == -1).all()
        for field in ("accepted", "token", "deferred"):
            assert torch.equal(getattr(with_mass, field), getattr(without, field))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 127, 4200])
def test_native_equals_reference(dtype: torch.dtype, vocabulary: int, native: None) -> None:
    import tta_ext

    k = 3
    base = torch.stack(
        [rows(Case(4, vocabulary, dtype, "contiguous", "model"), s) for s in range(k + 1)], 1
    )
    proxy = torch.stack(
        [rows(Case(4, vocabulary, dtype, "contiguous", "ties"), s + 9) for s in range(k + 1)], 1
    )
    base = (base.float() * 0.4).to(dtype)
    draft = torch.stack(
        [
            ops.categorical_sample(proxy[:, i].contiguous(), seed=2, position=i, stream=rng.DRAFT)
            for i in range(k)
        ],
        1,
    )
    cases = list(rule_cases())
    if vocabulary > 1000:  # where the reference is slow, in turn
        cases = cases[DTYPES.index(dtype) :: len(DTYPES)]
    for kwargs in cases:
        for sample in (True, False):
            results = []
            for name in ("reference", "cpu"):
                with tta_ext.use_backend(name):
                    results.append(
                        ops.deferral_verify(
                            base,
                            proxy,
                            draft,
                            torch.tensor([3, 2, 1, 0]),
                            seed=2,
                            position=0,
                            do_sample=sample,
                            **kwargs,
                        )
                    )
            one, other = results
            assert torch.equal(one.accepted, other.accepted)
            assert torch.equal(one.token, other.token)
            assert torch.equal(one.deferred, other.deferred)
            torch.testing.assert_close(one.mass, other.mass, rtol=1e-5, atol=1e-7)


def test_models_of_different_dtype(backend: str) -> None:
    """Each row is read in its own dtype: the same as widening both first."""
    g = torch.Generator().manual_seed(5)
    base = torch.randn(2, 3, 300, generator=g).bfloat16()
    proxy = torch.randn(2, 3, 300, generator=g).half()
    draft = torch.tensor([[3, 7], [250, 1]])
    length = torch.tensor([2, 1])
    keys = {"rule": "knapsack", "param": 0.4, "seed": 1, "position": 5}
    mixed = ops.deferral_verify(base, proxy, draft, length, **keys)
    wide = ops.deferral_verify(base.float(), proxy.float(), draft, length, **keys)
    for one, other in zip(mixed, wide, strict=True):
        assert torch.equal(one, other)
    mixed_row = ops.deferral_sample(base[:, 0], proxy[:, 0], **keys)
    wide_row = ops.deferral_sample(base[:, 0].float(), proxy[:, 0].float(), **keys)
    assert torch.equal(mixed_row.token, wide_row.token)
    assert torch.equal(
        ops.deferral_probs(base[:, 0], proxy[:, 0], rule="threshold", param=0.1),
        ops.deferral_probs(base[:, 0].float(), proxy[:, 0].float(), rule="threshold", param=0.1),
    )


def test_what_the_benchmark_says_of_block_verification() -> None:
    """The published example: 10/9 of two tokens stand one by one, 11/9 as a block."""
    pi, q = (torch.tensor([row, row], dtype=torch.float64) / 3 for row in ([1, 2], [2, 1]))
    means = torch.zeros(2, dtype=torch.float64)
    for draft in itertools.product(range(2), repeat=2):
        found = torch.stack(verified(pi, q, torch.tensor(draft)))
        means += q[0, draft[0]] * q[1, draft[1]] * found
    assert means.tolist() == pytest.approx([10 / 9, 11 / 9])
    one = verified(pi[:1], q[:1], torch.tensor([0]))
    assert one[0] == one[1] == 0.5

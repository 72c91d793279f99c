"""Bad values: the sentence of each, what unchecked rows become; empty batches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from calls import (
    B,
    Case,
    V,
    doubles,
    draw,
    good,
    hopeless,
    ids,
    knapsack,
    mask,
    perturb,
    propose,
    reward,
    sample,
    spoiled,
    update,
    verify,
    weights,
)

from tta_ext import dispatch, ops
from tta_ext.backends.reference.prelogit import control_update
from tta_ext.schemas import OPS

# What only reading the values can tell.
VALUES: dict[str, Case] = {
    "base NaN": (
        lambda: sample(spoiled(torch.nan)),
        ValueError,
        "row 2 of base_logits has NaN or +inf, or no finite value",
    ),
    "base +inf": (
        lambda: mask(spoiled(torch.inf)),
        ValueError,
        "row 2 of base_logits has NaN or +inf, or no finite value",
    ),
    "base impossible": (
        lambda: propose(hopeless()),
        ValueError,
        "row 1 of base_logits has NaN or +inf, or no finite value",
    ),
    "half NaN": (
        lambda: propose(spoiled(torch.nan).half()),
        ValueError,
        "row 2 of base_logits has NaN",
    ),
    "bfloat16 +inf": (
        lambda: draw(spoiled(torch.inf).bfloat16()),
        ValueError,
        "row 2 of logits has NaN",
    ),
    "proxy NaN": (
        lambda: ops.deferral_probs(good(), spoiled(torch.nan), rule="threshold", param=0.1),
        ValueError,
        "row 2 of proxy_logits has NaN or +inf, or no finite value",
    ),
    "stats": (
        lambda: ops.deferral_stats(hopeless(), rule="threshold", param=0.1),
        ValueError,
        "row 1 of base_logits has NaN",
    ),
    "stats, proxy rule": (
        lambda: ops.deferral_stats(good(), hopeless(), rule="proxy_below", param=0.1),
        ValueError,
        "row 1 of proxy_logits has NaN",
    ),
    "budget of a row": (
        lambda: mask(param=doubles(0.1, -0.2, 0.3)),
        ValueError,
        "param[1] is -0.2",
    ),
    "threshold of a row": (
        lambda: sample(param=doubles(0.1, 0.2, torch.nan)),
        ValueError,
        "param[2] is",
    ),
    "position of a row": (
        lambda: sample(position=ids(1, 2, -3)),
        ValueError,
        "position[2] is -3, expected 0 <= position < 2**32",
    ),
    "sequence of a row": (
        lambda: draw(sequence=ids(1, 2**32, 3)),
        ValueError,
        "sequence[1] is 4294967296, expected 0 <= sequence < 2**32",
    ),
    "verify base": (
        lambda: verify(base_logits=torch.full((B, 3, V), torch.nan)),
        ValueError,
        "row 0, position 0 of base_logits has NaN or +inf, or no finite value",
    ),
    "verify proxy": (
        lambda: verify(proxy_logits=torch.full((B, 3, V), torch.inf)),
        ValueError,
        "row 0, position 0 of proxy_logits has NaN or +inf, or no finite value",
    ),
    "verify draft id": (
        lambda: verify(draft=torch.full((B, 2), V)),
        ValueError,
        "draft[0] is 8, expected 0 <= draft < 8",
    ),
    "verify draft length": (
        lambda: verify(draft_length=ids(0, 3, 1)),
        ValueError,
        "draft_length[1] is 3, expected 0 <= draft_length < 3",
    ),
    "expert": (
        lambda: reward(expert=torch.stack((good(), spoiled(torch.nan)))),
        ValueError,
        "row 2 of expert_logits[1] has NaN or +inf, or no finite value",
    ),
    "anti": (
        lambda: reward(anti=torch.stack((hopeless(), good()))),
        ValueError,
        "row 1 of anti_logits[0] has NaN or +inf, or no finite value",
    ),
    "beta": (lambda: reward(beta=[1.0, torch.inf]), ValueError, "beta[1] is inf"),
    "profit": (
        lambda: knapsack(profit=spoiled(-1.0)),
        ValueError,
        "row 2 of profit has a negative, infinite or NaN value",
    ),
    "weight": (
        lambda: knapsack(weight=spoiled(torch.inf)),
        ValueError,
        "row 2 of weight has a negative, infinite or NaN value",
    ),
    "capacity of a row": (
        lambda: knapsack(capacity=doubles(1, -2, 3)),
        ValueError,
        "capacity[1] is -2",
    ),
    "step of a rollout": (
        lambda: perturb(step=ids(0, -1, 0)),
        ValueError,
        "step[1] is -1, expected 0 <= step < 2**32",
    ),
    "row of a rollout": (
        lambda: perturb(row=ids(0, 1, 2)),
        ValueError,
        "row[2] is 2, expected 0 <= row < 2",
    ),
    "rollout of a rollout": (
        lambda: perturb(rollout=ids(0, 1, 65536)),
        ValueError,
        "rollout[2] is 65536, expected 0 <= rollout < 65536",
    ),
    "weights of the update": (
        lambda: update(weights=torch.full((2, 5), torch.nan)),
        ValueError,
        "row 0 of weights has NaN or inf",
    ),
}


HUGE = 10**400
# What has the wrong type, or a value that only arithmetic would trip over.
ODD: dict[str, Case] = {
    **{
        f"{name} 1.5": (
            lambda name=name: draw(**{name: 1.5}),
            TypeError,
            f"{name} is 1.5, expected",
        )
        for name in ("iteration", "stream", "draw", "rollout", "position", "sequence", "seed")
    },
    "step 1.5": (lambda: perturb(step=1.5), TypeError, "step is 1.5, expected an int"),
    "row of text": (lambda: perturb(row="a"), TypeError, "row is 'a', expected an int"),
    "normal step": (lambda: ops.normal(3, seed=1, step=1.5), TypeError, "step is 1.5, expected"),
    "normal n": (lambda: ops.normal(1.5, seed=1), TypeError, "n is 1.5, expected an int"),
    "rollouts": (lambda: update(rollouts=(0, 1.5)), TypeError, "expected two ints (start, stop)"),
    "huge temperature": (lambda: draw(temperature=HUGE), ValueError, "temperature is 1000"),
    "huge param": (
        lambda: mask(param=HUGE),
        ValueError,
        "param is an int beyond float64, expected",
    ),
    "huge capacity": (
        lambda: knapsack(capacity=HUGE),
        ValueError,
        "capacity is an int beyond float64, expected",
    ),
    "huge sigma": (lambda: perturb(sigma=HUGE), ValueError, ", expected a finite number >= 0"),
    "sigma beyond float32": (
        lambda: update(sigma=1e39),
        ValueError,
        "sigma is 1e+39, expected a finite number >= 0",
    ),
    "sigma of text": (lambda: weights(sigma="1"), TypeError, "sigma is '1', expected a number"),
    "lam of text": (lambda: weights(lam="1"), TypeError, "lam is '1', expected a number"),
    "alpha NaN": (
        lambda: weights(alpha=torch.nan),
        ValueError,
        "alpha is nan, expected 0 <= alpha",
    ),
    "beta of text": (lambda: reward(beta="ab"), TypeError, "beta is 'ab', expected 2 finite numb"),
    "beta huge": (lambda: reward(beta=[1.0, HUGE]), TypeError, "expected 2 finite numbers"),
    "weights in a list": (
        lambda: update(weights=[[1.0]]),
        TypeError,
        "weights is [[1.0]], expected a tensor of dtype torch.float32",
    ),
    "lengths in a list": (
        lambda: verify(draft_length=[1, 2, 2]),
        TypeError,
        "draft_length is [1, 2, 2], expected a tensor of dtype torch.int64",
    ),
    "sparse logits": (
        lambda: draw(good().to_sparse()),
        TypeError,
        "logits is of layout torch.sparse_coo, expected a plain tensor",
    ),
    "no sparse rows": (
        lambda: draw(torch.zeros(0, 8).to_sparse()),
        TypeError,
        "logits is of layout torch.sparse_coo, expected a plain tensor",
    ),
    "no mean": (
        lambda: update(mean=None),
        TypeError,
        "mean is NoneType, expected a tensor [P, tau, d]",
    ),
    "sparse proxy": (
        lambda: sample(good(), good().to_sparse_csr()),
        TypeError,
        "proxy_logits is of layout torch.sparse_csr, expected a plain tensor",
    ),
    "sparse weights": (
        lambda: update(weights=torch.zeros(2, 5).to_sparse()),
        TypeError,
        "weights is of layout torch.sparse_coo, expected a plain tensor",
    ),
    "nested logits": (
        lambda: draw(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        TypeError,
        "logits is nested, expected a plain tensor",
    ),
    "verify's last position": (
        lambda: verify(position=2**32 - 2),
        ValueError,
        "position is 4294967294, expected 0 <= position < 2**32 - 2",
    ),
    "verify's last position of a row": (
        lambda: verify(position=ids(0, 2**32 - 2, 0)),
        ValueError,
        "position[1] is 4294967294, expected 0 <= position < 2**32 - 2",
    ),
    "a cost that overflows": (
        lambda: weights(sigma=1e-300, dot=torch.ones(2, 4)),
        ValueError,
        "row 0 of the scores is undefined or has no finite value",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR")
@pytest.mark.parametrize("case", ODD.values(), ids=ODD)
def test_odd_arguments(backend: str, case: Case) -> None:
    call, kind, text = case
    with pytest.raises(kind, match=re.escape(text)) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_kernels_refusal_names_no_file(native: None) -> None:
    """What only the kernels' own checks see is a ``ValueError`` in their words."""
    counter, key = torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^key must have 2 words$"):
        dispatch.invoke(OPS["philox"], (counter, key), None)
    failure = RuntimeError("check_cuda, /a/csrc/bind/cuda.cpp:66, philox failed on cuda:0\nmore")
    assert str(dispatch.translated(failure)) == "philox failed on cuda:0"
    assert type(dispatch.translated(failure)) is RuntimeError
    other = RuntimeError("something else, /a/b.cpp:1, of torch's")
    assert dispatch.translated(other) is other


def test_raw_operators_that_cannot_tell_their_outputs() -> None:
    raw, one = torch.ops.tta_ext, torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^counter has no dimension, expected at least one$"):
        raw.philox(torch.tensor(0), one)
    with pytest.raises(TypeError, match=r"^seed is None, expected a tensor$"):
        raw.normal(4, None, 0, 0, 0, 0)


def test_no_rows_of_any_stride(backend: str) -> None:
    for none in (torch.zeros(8, 0).t(), torch.zeros(0).as_strided((0, 8), (1, 2))):
        assert none.shape == (0, 8)
        assert draw(none).shape == (0,)


@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES)
def test_values(case: Case, backend: str) -> None:
    call, kind, text = case
    with pytest.raises(kind, match=re.escape(text)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_unchecked_rows_are_marked(backend: str) -> None:
    """check=False: token -1, masses NaN, and the other rows as if alone."""
    bad = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    proxy = bad.flip(1).contiguous()
    clean = bad.clone()
    bad[1, 3], bad[2] = torch.nan, -torch.inf
    fine = torch.tensor([0, 3])
    kwargs: dict[str, Any] = {"rule": "knapsack", "param": 0.4}
    key: dict[str, Any] = {"seed": 1, "position": 0}

    for sample_it in (True, False):
        got = ops.deferral_sample(bad, proxy, check=False, do_sample=sample_it, **kwargs, **key)
        want = ops.deferral_sample(clean, proxy, do_sample=sample_it, **kwargs, **key)
        assert got.token[1:3].tolist() == [-1, -1]
        assert not got.deferred[1:3].any()
        assert torch.equal(got.token[fine], want.token[fine])
        got = ops.deferral_propose(bad, check=False, do_sample=sample_it, **kwargs, **key)
        assert got.token[1:3].tolist() == [-1, -1]
        assert not got.deferred[1:3].any()

    masks = ops.deferral_mask(bad, check=False, **kwargs)
    assert not masks.mask[1:3].any()
    assert masks.critical[1:3].tolist() == [-2, -2]
    assert masks.fraction[1:3].isnan().all()
    assert torch.equal(masks.mask[fine], ops.deferral_mask(clean, **kwargs).mask[fine])

    law = ops.deferral_probs(bad, proxy, check=False, **kwargs)
    assert law[1:3].isnan().all()
    assert torch.equal(law[fine], ops.deferral_probs(clean, proxy, **kwargs)[fine])
    swapped = ops.deferral_probs(proxy, bad, check=False, **kwargs)
    assert swapped[1:3].isnan().all()
    assert not swapped[fine].isnan().any()

    stats = ops.deferral_stats(bad, check=False, **kwargs)
    for name in ("deferred_mass", "cut_logit", "used"):
        assert getattr(stats, name)[1:3].isnan().all(), name
    assert stats.critical[1:3].tolist() == [-2, -2]

    assert ops.categorical_sample(bad, check=False, **key)[1:3].tolist() == [-1, -1]
    assert ops.categorical_sample(bad, check=False, do_sample=False)[1:3].tolist() == [-1, -1]

    items = clean.abs()
    items[1, 0] = -1.0
    sack = ops.greedy_knapsack(items, clean.abs(), 1.0, check=False)
    assert not sack.selected[1].any()
    assert int(sack.critical[1]) == -2
    for name in ("used", "value", "upper_bound"):
        assert getattr(sack, name)[1].isnan(), name


def test_a_rejected_row_with_a_bad_proxy_is_marked(backend: str) -> None:
    base, proxy = good(), hopeless()
    got = ops.deferral_sample(
        base, proxy, rule="nudging", param=1.5, seed=0, position=0, check=False
    )
    assert int(got.token[1]) == -1
    assert not bool(got.deferred[1])
    assert got.deferred[[0, 2]].all()


def test_unchecked_budgets_mark_their_rows(backend: str) -> None:
    got = ops.deferral_mask(
        good(), rule="knapsack", param=doubles(0.5, -1.0, torch.nan), check=False
    )
    assert got.critical.tolist() == [4, -2, -2]


def test_empty_batches(backend: str) -> None:
    none, cube = torch.zeros(0, V), torch.zeros(0, 3, V)
    kwargs: dict[str, Any] = {"rule": "knapsack", "param": 0.3}
    key: dict[str, Any] = {"seed": 1, "position": 0}
    assert ops.deferral_mask(none, **kwargs).mask.shape == (0, V)
    assert ops.deferral_probs(none, none, **kwargs).shape == (0, V)
    assert ops.deferral_stats(none, **kwargs).used.shape == (0,)
    assert ops.deferral_propose(none, **kwargs, **key).token.shape == (0,)
    assert ops.deferral_sample(none, none, **kwargs, **key).token.shape == (0,)
    assert ops.deferral_sample(none, none, do_sample=False, **kwargs).token.shape == (0,)
    draft = torch.zeros(0, 2, dtype=torch.int64)
    lengths = torch.zeros(0, dtype=torch.int64)
    verified = ops.deferral_verify(cube, cube, draft, lengths, **kwargs, **key)
    assert verified.mass.shape == (0, 3)
    assert ops.implicit_reward_probs(none, none[None], None, 1.0).shape == (0, V)
    assert ops.implicit_reward_sample(none, none[None], None, 1.0, **key).shape == (0,)
    assert ops.categorical_sample(none, **key).shape == (0,)
    assert ops.greedy_knapsack(none, none, 1.0).selected.shape == (0, V)
    assert perturb(hidden=none).shape == (0, V)


def test_the_reference_sums_no_more_rollouts_than_there_are() -> None:
    """It would go on for centuries."""
    mean, weights = torch.zeros(1, 2, 4), torch.ones(1, 2)
    key = torch.zeros((), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for start, stop in ((0, 1 << 62), (-1, 1), (2, 2)):
        with pytest.raises(ValueError, match="none of 65536"):
            control_update(mean, weights, None, *key, 1, 0.5, start, stop, True, True)

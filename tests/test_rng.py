"""Philox, uniforms, normals, seeds."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import tta_ext
from tta_ext import ops, rng
from tta_ext.backends import reference

ONES = 0xFFFFFFFF

# Random123's known answers for philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], block: tuple[int, ...], backend: str
) -> None:
    found = ops.philox(torch.tensor(counter), torch.tensor(key))
    assert found.tolist() == list(block)


def test_shapes_and_high_bits(backend: str) -> None:
    counter = torch.arange(24).reshape(2, 3, 4)
    key = torch.tensor([1, 2])
    found = ops.philox(counter, key)
    assert found.shape == (2, 3, 4)
    assert torch.equal(ops.philox(counter - (1 << 32), key + (5 << 32)), found)
    assert torch.equal(ops.philox(counter[1, 2], key), found[1, 2])
    assert ops.philox(torch.zeros(0, 4, dtype=torch.int64), key).shape == (0, 4)
    assert torch.equal(ops.philox(counter.transpose(0, 1), key), found.transpose(0, 1))


def test_native_philox_equals_reference(native: None) -> None:
    g = torch.Generator().manual_seed(1)
    counter = torch.randint(0, 1 << 32, (1000, 4), generator=g)
    key = torch.randint(0, 1 << 32, (2,), generator=g)
    with tta_ext.use_backend("cpu"):
        found = ops.philox(counter, key)
    assert torch.equal(found, reference.philox(counter, key))
    assert (found >= 0).all()
    assert (found < 1 << 32).all()


def test_normals_are_normal(backend: str) -> None:
    sample = torch.cat([ops.normal(4096, seed=2024, step=t) for t in range(25)]).double()
    assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3
    assert sample.abs().max() < 6
    for residue in range(4):
        part = sample.reshape(-1, 4)[:, residue]
        assert stats.kstest(part.numpy(), "norm").pvalue > 1e-3
    pairs = sample.reshape(-1, 4)
    correlation = torch.corrcoef(pairs.T) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / len(pairs) ** 0.5
    neighbours = torch.corrcoef(torch.stack((sample[:-4], sample[4:])))[0, 1]
    assert abs(neighbours) < 4.5 / len(sample) ** 0.5


def test_normals_of_different_names_are_independent(backend: str) -> None:
    names = [
        {"seed": 1},
        {"seed": 1 << 40 | 1},
        {"seed": 1, "step": 1},
        {"seed": 1, "sequence": 1},
        {"seed": 1, "iteration": 1},
        {"seed": 1, "rollout": 1},
    ]
    samples = torch.stack([ops.normal(20000, **name) for name in names])
    correlation = torch.corrcoef(samples) - torch.eye(len(names))
    assert correlation.abs().max() < 4.5 / 20000**0.5


def test_normals_within_ulps_of_float64(backend: str) -> None:
    got = ops.normal(65536, seed=99, step=3, sequence=7, iteration=2, rollout=5).double()
    want = reference.normal(65536, torch.tensor(99), 3, 7, 2, 5, compute_dtype=torch.float64)
    # sqrt and log are good to an ulp or two; the angle's rounding is absolute near a zero of cos.
    radius = want.reshape(-1, 2).norm(dim=1).repeat_interleave(2)
    assert ((got - want).abs() <= 2.0**-21 * radius).all()


def test_normals_do_not_depend_on_their_number(backend: str) -> None:
    whole = ops.normal(1000, seed=5)
    for n in (0, 1, 2, 3, 4, 7, 64, 999):
        assert torch.equal(ops.normal(n, seed=5), whole[:n])


def test_seeds_are_64_bits(backend: str) -> None:
    assert torch.equal(ops.normal(8, seed=-1), ops.normal(8, seed=2**64 - 1))
    assert torch.equal(ops.normal(8, seed=2**63), ops.normal(8, seed=-(2**63)))
    assert torch.equal(ops.normal(8, seed=7), ops.normal(8, seed=torch.tensor(7)))
    assert not torch.equal(ops.normal(8, seed=7), ops.normal(8, seed=7 + 2**32))


def test_counter_layout(backend: str) -> None:
    """The map that rng documents, word by word."""
    logits = torch.zeros(1, 1 << 12)
    for stream in rng.STREAMS.values():
        token = ops.categorical_sample(
            logits,
            seed=2**33 + 5,
            position=11,
            sequence=2**32 - 2,
            iteration=4095,
            rollout=65535,
            stream=stream,
            draw=17,
        )
        block = ops.philox(
            torch.tensor([17, 11, 2**32 - 2, stream << 28 | 4095 << 16 | 65535]),
            torch.tensor([5, 2]),
        )
        assert int(token) == int(block[0]) >> 20


def test_seed_from_generator() -> None:
    g = torch.Generator().manual_seed(3)
    first, second = rng.seed_from_generator(g), rng.seed_from_generator(g)
    assert first != second
    assert rng.seed_from_generator(torch.Generator().manual_seed(3)) == first
    assert all(-(2**63) <= seed < 2**63 for seed in (first, second))


def test_resolve_seed() -> None:
    assert rng.resolve_seed(2**64 - 1) == -1
    assert rng.resolve_seed(torch.tensor(5)) == 5  # type: ignore[arg-type]
    first = rng.seed_from_generator(torch.Generator().manual_seed(3))
    assert rng.resolve_seed(torch.Generator().manual_seed(3)) == first
    state = torch.get_rng_state()
    try:
        torch.manual_seed(3)
        assert rng.resolve_seed(None) == first != rng.resolve_seed(None)
    finally:
        torch.set_rng_state(state)


def test_seed_and_key_conversions() -> None:
    assert rng.as_seed(2**64 - 1) == -1
    assert rng.as_seed(2**63) == -(2**63)
    assert rng.key(-1) == (ONES, ONES)
    assert rng.key(5 << 32 | 9) == (9, 5)
    with pytest.raises(ValueError, match=r"seed is \d+, expected -2\*\*63 <= seed < 2\*\*64"):
        rng.as_seed(2**64)


def test_streams_are_distinct_and_fit_four_bits() -> None:
    tags = list(rng.STREAMS.values())
    assert sorted(tags) == list(range(10))
    words = {int(rng.stream_word(tag, 4095, 65535)) for tag in tags}
    assert len(words) == 10
    assert max(words) < 1 << 32


def test_streams_are_documented() -> None:
    assert all(name in (rng.__doc__ or "") for name in rng.STREAMS)

"""The C++ core against NumPy's float64, and its bits across instruction sets.

The exhaustive walks and the bit-for-bit definitions live in ``csrc/testing/*_test.cpp``; these are
independent of them: another language, another library's exp and log, another author's Philox.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import native
import numpy as np
import pytest

from tta_ext import rules
from tta_ext.build import BuildError

MAX_FLOAT = np.finfo(np.float32).max
SMALLEST_ARGUMENT = np.float32(float.fromhex("-0x1.5d589ep+6"))  # just above ln 2^-126


@pytest.fixture(scope="module")
def core() -> ModuleType:
    try:
        return native.testing_module()
    except BuildError as error:
        pytest.skip(f"no C++ compiler: {error}")


@pytest.fixture(scope="module")
def levels(core: ModuleType) -> range:
    return range(len(core.levels()))


def bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).view({4: np.uint32, 8: np.uint64}[np.asarray(x).itemsize])


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Error in units of the last place of a float32 as large as ``want`` (float64)."""
    exponent = np.maximum(np.frexp(want)[1] - 1, -126)
    return np.abs(got.astype(np.float64) - want) / np.ldexp(1.0, exponent - 23)


def every_nth_float(first: float, last: float, count: int) -> np.ndarray:
    """``count`` floats between two of one sign, evenly spread over their bit patterns."""
    low, high = (int(np.float32(x).view(np.uint32)) for x in (first, last))
    return np.linspace(low, high, count).round().astype(np.uint32).view(np.float32)


def logits(kind: str, vocab: int, rng: np.random.Generator) -> np.ndarray:
    x = (rng.normal(size=vocab) * 3).astype(np.float32)
    x[rng.integers(vocab, size=4)] += 9
    if kind == "half":
        return x.astype(np.float16)
    if kind == "bfloat16":
        return (bits(x) >> 16).astype(np.uint16)
    if kind == "ties":
        return np.round(x)
    if kind == "padded":
        x[vocab - vocab // 5 :] = -np.inf
    return x


def widened(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


KINDS = ("float", "half", "bfloat16", "ties", "padded")
SIZES = (1, 2, 127, 128, 129, 4095, 4097, 17000)


def test_exp_is_monotone_and_accurate(core: ModuleType, levels: range) -> None:
    x = np.concatenate(
        [
            every_nth_float(-np.inf, -1e-30, 400_001),
            [np.float32(-0.0), np.float32(0.0)],
            every_nth_float(1e-30, 88.0, 200_001),
        ]
    ).astype(np.float32)
    # Consecutive floats at the tops of the binades below 0, where a careless polynomial steps back.
    top = np.concatenate(
        [np.arange(200_000, dtype=np.uint32)[::-1] + bits(np.float32(-b)) for b in (0.2, 0.1, 0.05)]
    ).view(np.float32)
    for level in levels:
        y = core.exp(level, x)
        assert (np.diff(y) >= 0).all()
        assert (y[x < SMALLEST_ARGUMENT] == 0).all()
        normal = x >= SMALLEST_ARGUMENT
        assert ulps(y[normal], np.exp(x[normal].astype(np.float64))).max() <= 1.02
        for run in np.split(top, 3):
            assert (np.diff(core.exp(level, run)) >= 0).all()


def test_exp_special_values(core: ModuleType, levels: range) -> None:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    for level in levels:
        assert np.isnan(core.exp(level, nans.view(np.float32))).all()
        got = core.exp(level, np.array([-np.inf, -MAX_FLOAT, -0.0, 0.0], np.float32))
        np.testing.assert_array_equal(got, [0, 0, 1, 1])
        below = np.nextafter(SMALLEST_ARGUMENT, np.float32(-np.inf))
        edge = core.exp(level, np.array([below, SMALLEST_ARGUMENT], np.float32))
        assert edge[0] == 0 and edge[1] >= np.finfo(np.float32).tiny


def test_log_is_accurate(core: ModuleType, levels: range) -> None:
    x = np.concatenate(
        [
            every_nth_float(np.finfo(np.float32).tiny, MAX_FLOAT, 400_001),
            every_nth_float(0.999, 1.001, 20_000),
        ]
    )
    want = np.log(x.astype(np.float64))
    for level in levels:
        got = core.log(level, x)
        exact = want == 0
        assert (got[exact] == 0).all()
        assert ulps(got[~exact], want[~exact]).max() <= 1.0


def test_normals_are_accurate(core: ModuleType, levels: range) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(2**32, size=(2, 300_000), dtype=np.uint32)
    a[:4] = [0, 511, 2**32 - 1, 2**32 - 512]
    b[:4] = [0, 2**31, 2**30, 2**32 - 1]
    u1, u2 = (((2.0 * (x >> 9) + 1) * 2.0**-24) for x in (a, b))
    radius = np.sqrt(-2 * np.log(u1))
    for level in levels:
        cosine, sine = core.normal_pair(level, a, b)
        np.testing.assert_allclose(cosine, radius * np.cos(2 * np.pi * u2), rtol=4e-7, atol=1e-12)
        np.testing.assert_allclose(sine, radius * np.sin(2 * np.pi * u2), rtol=4e-7, atol=1e-12)


def test_philox(core: ModuleType) -> None:
    """Known answers of Random123, then Salmon's recurrence in Python integers."""
    known = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, want in known:
        assert core.philox(counter, key) == [int(word, 16) for word in want.split()]
    rng = np.random.default_rng(1)
    for _ in range(50):
        c = [int(x) for x in rng.integers(2**32, size=4)]
        k = [int(x) for x in rng.integers(2**32, size=2)]
        got = core.philox(c, k)
        for round_ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            k0 = (k[0] + round_ * 0x9E3779B9) % 2**32
            k1 = (k[1] + round_ * 0xBB67AE85) % 2**32
            c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        assert got == c


def test_rules_are_those_of_python(core: ModuleType) -> None:
    assert core.rules() == [
        ("k" + name.title().replace("_", ""), code, code in rules.NEEDS_PROXY)
        for code, name in enumerate(rules.RULE_NAMES)
    ]


# Whether a token is deferred, by its probabilities, the largest ones, the parameter and the total
# variation of p and q.
VERDICTS: dict[str, Callable[[float, float, float, float, float, float], bool]] = {
    "threshold": lambda p, q, max_p, max_q, t, tv: p < t,
    "confidence_bet": lambda p, q, max_p, max_q, t, tv: p < max_q - t,
    "nudging": lambda p, q, max_p, max_q, t, tv: max_p < t,
    "relative": lambda p, q, max_p, max_q, t, tv: p < max_p - t,
    "argmax": lambda p, q, max_p, max_q, t, tv: p < max_p,
    "proxy_below": lambda p, q, max_p, max_q, t, tv: q < max_p + t,
    "proxy_above": lambda p, q, max_p, max_q, t, tv: q > max_p + t,
    "relative_ratio": lambda p, q, max_p, max_q, t, tv: p < max_p * (1 - t),
    "optimal": lambda p, q, max_p, max_q, t, tv: max_p < max_q - t * tv,
}


@pytest.mark.parametrize("rule", rules.RULE_NAMES)
def test_verdict_of_a_rule(core: ModuleType, rule: str) -> None:
    """What core/rules.h says on CPU and CUDA, next to each threshold and on it."""
    verdict = VERDICTS.get(rule, lambda *_: False)  # the knapsack's is not by one probability
    around = [np.nextafter(np.float32(0.25), np.float32(side)) for side in (0, 0.25, 1)]
    tokens = [0.0, 2.0**-149, *map(float, around), 0.5, 0.75, 1.0]
    params = [0.0, -0.0, *map(float, around), -0.25, 0.5, 0.75, 1.0, 2.0, -2.0, np.inf, -np.inf]
    seen = set()
    for p, q, max_p, max_q, param, tv in itertools.product(
        tokens, tokens, (0.25, 0.5, 1.0), (0.5, 0.75), params, (0.0, 0.25, 1.0)
    ):
        want = verdict(p, q, max_p, max_q, param, tv)
        got = core.rule_defers(rules.rule_code(rule), param, max_p, max_q, p, q, tv)
        assert got is want, (p, q, max_p, max_q, param, tv)
        seen.add(want)
    assert seen == ({False, True} if rule in VERDICTS else {False})


def test_noise_is_made_of_philox_blocks(core: ModuleType, levels: range) -> None:
    seed, step, sequence, iteration, rollout = 0x123456789ABCDEF, 5, 2**32 - 2, 4095, 65535
    n = 131
    words = np.array(
        [
            core.philox(
                [block, step, sequence, 7 << 28 | iteration << 16 | rollout],
                [seed % 2**32, seed >> 32],
            )
            for block in range((n + 3) // 4)
        ],
        np.uint32,
    ).reshape(-1, 2)
    pairs = core.normal_pair(0, words[:, 0].copy(), words[:, 1].copy())
    want = np.stack(pairs, axis=1).ravel()[:n]
    for level in levels:
        got = core.noise(level, n, seed, step, sequence, iteration, rollout)
        np.testing.assert_array_equal(bits(got), bits(want))


def test_halves_match_numpy(core: ModuleType) -> None:
    pattern = np.arange(2**16, dtype=np.uint16)
    want = pattern.view(np.float16).astype(np.float32)
    got = core.half_to_float(pattern)
    np.testing.assert_array_equal(got, want)
    x = np.random.default_rng(2).integers(2**32, size=200_000, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(core.float_to_half(x), want.view(np.uint16))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_same_bits_everywhere(core: ModuleType, levels: range, kind: str) -> None:
    rng = np.random.default_rng(3)
    for vocab, inverse in itertools.product(SIZES, (1.0, 2.5)):
        x = logits(kind, vocab, rng)
        wide = widened(x)
        weights = np.exp((wide - wide.max()) * inverse)
        valid, top, z = core.canonical_sum(0, x, inverse)
        assert valid and top == wide.max()
        np.testing.assert_allclose(z, weights.sum(), rtol=2e-6)
        capacity = z * np.array([0, 1e-12, 0.01, 0.3, 0.7, 1 - 1e-9, 1])
        u = rng.integers(2**32, size=50) * 2.0**-32
        cut = core.knapsack_cut(0, x, inverse, capacity)
        tokens = core.draw(0, x, inverse, u)
        p = core.probabilities(0, x, inverse)
        np.testing.assert_allclose(p, weights / weights.sum(), rtol=1e-5, atol=1e-37)
        assert cut[-1] == -1 and np.isfinite(wide[tokens]).all()
        for level in levels[1:]:
            assert core.canonical_sum(level, x, inverse) == (valid, top, z)
            np.testing.assert_array_equal(core.knapsack_cut(level, x, inverse, capacity), cut)
            np.testing.assert_array_equal(core.draw(level, x, inverse, u), tokens)
            np.testing.assert_array_equal(bits(core.probabilities(level, x, inverse)), bits(p))


@pytest.mark.parametrize("kind", KINDS)
def test_knapsack_cut_is_the_definition(core: ModuleType, levels: range, kind: str) -> None:
    """Sorted by NumPy; the item whose S first exceeds the capacity."""
    rng = np.random.default_rng(4)
    for vocab in (1, 5, 129, 700):
        x = logits(kind, vocab, rng)
        wide = widened(x)
        order = np.argsort(wide, kind="stable")
        s = core.prefix_sum(0, x, 1.0, list(wide[order]), [int(i) + 1 for i in order])
        assert (np.diff(s) >= 0).all()
        assert s[-1] == core.canonical_sum(0, x, 1.0)[2]
        capacity = np.concatenate([s, np.nextafter(s, 0), np.nextafter(s, np.inf)])
        first = np.searchsorted(s, capacity, side="right")
        want = np.append(order, -1)[first]
        for level in levels:
            np.testing.assert_array_equal(core.knapsack_cut(level, x, 1.0, capacity), want)


def test_draws_follow_the_distribution(core: ModuleType) -> None:
    """Equally spaced uniforms hit every token in proportion to its probability."""
    x = logits("float", 50, np.random.default_rng(5))
    n = 1 << 16
    tokens = core.draw(0, x, 1.0, (np.arange(n) + 0.5) / n)
    assert (np.diff(tokens) >= 0).all()
    counts = np.bincount(tokens, minlength=len(x))
    assert np.abs(counts - n * core.probabilities(0, x, 1.0).astype(np.float64)).max() <= 1


def test_invalid_rows_are_noticed(core: ModuleType, levels: range) -> None:
    for level, vocab in itertools.product(levels, (1, 4097)):
        for bad in (np.nan, np.inf):
            x = np.zeros(vocab, np.float32)
            x[vocab // 2] = bad
            assert not core.canonical_sum(level, x, 1.0)[0]
        assert not core.canonical_sum(level, np.full(vocab, -np.inf, np.float32), 1.0)[0]


def test_module_refuses_what_it_cannot_read(core: ModuleType, levels: range) -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="not available"):
        core.exp(len(levels), x)
    with pytest.raises(TypeError, match="float32"):
        core.canonical_sum(0, x.astype(np.float64), 1.0)
    with pytest.raises(ValueError, match="unit stride"):
        core.canonical_sum(0, x[::2], 1.0)

"""Best-of-n, soft best-of-n, ARGS, chunk-level beam search; budgets."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from models import EOS, base_model, greedy, make_tokenizer
from models import next_logits as all_logits
from scipy import stats
from searches import PROMPTS, SMALL, tokens_of, vowels

from tta_ext import ops, rng
from tta_ext.decoding import BestOfN, ChunkBeamSearch, RewardGuidedSearch
from tta_ext.decoding.search.base import SearchMethod


def next_logits(tokens: list[int]) -> torch.Tensor:
    """Logits of the tokens that the tokenizer knows; the model has some more."""
    return all_logits(base_model(), tokens)[:, : len(make_tokenizer())]


def make(method: type[SearchMethod[Any]], reward: Any = vowels, **options: Any) -> Any:
    return method(base_model(), reward, make_tokenizer(), **(SMALL | options))


# ---- best of n -------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[], list(range(35))])
def test_best_of_n_draws_from_the_model(ends: list[int]) -> None:
    """Each token is the op's draw at the model's logits, keyed by position, iteration, rollout."""
    tokenizer = make_tokenizer()
    method = make(BestOfN, n=5, group=4, temperature=0.8, eos_token_id=ends)
    result = method.generate(PROMPTS, seed=6)
    lengths = {len(one.tokens) for row in result.candidates for one in row}
    # With ends, some rollouts leave the batch at its first step and others go on.
    assert (1 in lengths and len(lengths) > 2) == bool(ends)
    for p, row in enumerate(result.candidates):
        prompt = tokenizer(PROMPTS[p])["input_ids"]
        for one in row:
            for t, token in enumerate(one.tokens):
                drawn = ops.categorical_sample(
                    next_logits(prompt + one.tokens[:t]),
                    temperature=0.8,
                    seed=6,
                    position=len(prompt) + t,
                    sequence=p,
                    iteration=one.iteration,
                    rollout=one.rollout,
                )
                assert int(drawn) == token
    places = [(one.iteration, one.rollout) for one in result.candidates[0]]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert result.best[0].reward == max(result.rewards[0])


def test_greedy_is_what_transformers_says() -> None:
    method = BestOfN(base_model(), lambda p, r: [0.0] * len(r), n=2, decoding="greedy", **SMALL)
    result = method.generate([[9, 8, 7]], seed=0)
    assert tokens_of(result)[0] == [greedy(base_model(), [9, 8, 7], 8)] * 2


def test_group_and_batch_do_not_matter_for_distinct_streams() -> None:
    whole = make(BestOfN, n=6, group=3).generate(PROMPTS, seed=1)
    split = make(BestOfN, n=6, group=3, batch_size=2).generate(PROMPTS, seed=1)
    assert tokens_of(whole) == tokens_of(split)
    assert make(BestOfN, n=5, group=2).settings.schedule() == [2, 2, 1]
    assert make(BestOfN, n=5, group=9).settings.schedule() == [5]


def test_soft_best_of_n_follows_its_law() -> None:
    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        return [0.0, 0.5, 1.0, -math.inf][: len(responses)]

    method = make(BestOfN, reward, n=4, soft=0.5, max_new_tokens=1)
    search = method.start("x", seed=3)
    search.run()
    counts = Counter()
    for seed in range(2000):
        search.seed = seed
        counts[search.choose(0).rollout] += 1
    want = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0) * 2000
    assert counts[3] == 0
    assert stats.chisquare([counts[i] for i in range(3)], want.tolist()).pvalue > 1e-3
    assert method.generate("x", seed=3, soft=0.0).best[0].rollout == 2


def test_eos_ends_an_answer() -> None:
    result = make(BestOfN, n=16, eos_token_id=list(range(15))).generate("hello", seed=0)
    row = result.candidates[0]
    assert {one.finish for one in row} == {"eos", "length"}
    for one in row:
        assert all(token >= 15 for token in one.tokens[:-1])
        assert (one.tokens[-1] < 15) == (one.finish == "eos")


# ---- ARGS ------------------------------------------------------------------------------------


def args_by_hand(prompt: list[int], new: int, k: int, weight: float, ends: set[int]) -> list[int]:
    tokenizer, written = make_tokenizer(), []
    while len(written) < new and not (written and written[-1] in ends):
        log_p = next_logits(prompt + written)[0].log_softmax(-1)
        top = log_p.topk(k).indices.tolist()
        texts = [tokenizer.decode([*written, v], skip_special_tokens=True) for v in top]
        scores = [float(log_p[v]) + weight * r for v, r in zip(top, vowels([], texts), strict=True)]
        written.append(top[scores.index(max(scores))])
    return written


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_args_is_its_definition(weight: float) -> None:
    ends = {EOS, 10, 11, 12, 77, 73}
    method = make(RewardGuidedSearch, candidates=6, weight=weight, eos_token_id=sorted(ends), n=1)
    result = method.generate(PROMPTS, seed=0)
    tokenizer = make_tokenizer()
    for p, text in enumerate(PROMPTS):
        prompt = tokenizer(text)["input_ids"]
        want = args_by_hand(prompt, 8, 6, weight, ends)
        assert result.best[p].tokens == want
        # k a token, and the answer itself.
        assert result.curves[p][-1].samples == 6 * len(want) + 1
    assert result.timing.reward_items == sum(c[-1].samples for c in result.curves)


def test_args_sampling_follows_its_law() -> None:
    method = make(
        RewardGuidedSearch, decoding="sample", candidates=4, weight=3.0, max_new_tokens=1, n=2000
    )
    result = method.generate("hello", seed=0)
    prompt = make_tokenizer()("hello")["input_ids"]
    log_p = next_logits(prompt)[0].log_softmax(-1)
    top = log_p.topk(4).indices.tolist()
    texts = [make_tokenizer().decode([v], skip_special_tokens=True) for v in top]
    scores = log_p[top] + 3.0 * torch.tensor(vowels([], texts))
    counts = Counter(one.tokens[0] for one in result.candidates[0])
    assert set(counts) <= set(top)
    want = torch.softmax(scores.double(), 0) * 2000
    assert stats.chisquare([counts[v] for v in top], want.tolist()).pvalue > 1e-3


def test_args_when_the_reward_rules_everything_out() -> None:
    never = RewardGuidedSearch(
        base_model(), lambda p, r: [-math.inf] * len(r), candidates=3, **SMALL
    )
    result = never.generate([[9, 8, 7]], seed=0)
    assert result.best[0].tokens == greedy(base_model(), [9, 8, 7], 8)


# ---- chunk-level beam search -----------------------------------------------------------------


def beams_by_hand(prompt: list[int], p: int, seed: int, ends: set[int]) -> list[list[int]]:
    """Three beams, two branches, chunks of three tokens, eight tokens."""
    tokenizer = make_tokenizer()

    def extend(tokens: list[int], chunk: int, rollout: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(3):
            if len(tokens) == 8 or (tokens and tokens[-1] in ends):
                break
            drawn = ops.categorical_sample(
                next_logits(prompt + tokens), seed=seed,
                position=len(prompt) + len(tokens), sequence=p, iteration=chunk, rollout=rollout,
            )  # fmt: skip
            tokens.append(int(drawn))
        return tokens

    parents: list[list[int]] = [[]] * 3
    finished: list[list[int]] = []
    for chunk in range(3):
        if not parents:
            break
        pool = list(finished)
        pool += [extend(t, chunk, 2 * i + j) for i, t in enumerate(parents) for j in range(2)]
        score = vowels([], [tokenizer.decode(t, skip_special_tokens=True) for t in pool])
        order = sorted(range(len(pool)), key=lambda i: -score[i])[:3]
        kept = [pool[i] for i in order]
        parents = [t for t in kept if len(t) < 8 and t[-1] not in ends]
        finished = [t for t in kept if t not in parents]
    return sorted(finished)


@pytest.mark.parametrize("ends", [set(), {5, 6, 7, 30, 31, 60, 61, 62}])
def test_chunk_beam_is_its_definition(ends: set[int]) -> None:
    method = make(ChunkBeamSearch, beams=3, branches=2, chunk=3, eos_token_id=sorted(ends))
    result = method.generate(PROMPTS, seed=4)
    tokenizer = make_tokenizer()
    for p, text in enumerate(PROMPTS):
        prompt = tokenizer(text)["input_ids"]
        assert sorted(tokens_of(result)[p]) == beams_by_hand(prompt, p, 4, ends)
        assert result.best[p].reward == max(result.rewards[p])
        assert len(result.candidates[p]) <= 3
    assert result.timing.reward_items == sum(c[-1].samples for c in result.curves)
    assert result.timing.tokens == sum(c[-1].tokens for c in result.curves)


def test_one_chunk_is_best_of_n() -> None:
    beams = make(ChunkBeamSearch, beams=1, branches=6, chunk=8).generate(PROMPTS, seed=2)
    plain = make(BestOfN, n=6).generate(PROMPTS, seed=2)
    assert [one.tokens for one in beams.best] == [one.tokens for one in plain.best]


def test_restarts_are_independent() -> None:
    twice = make(ChunkBeamSearch, beams=2, branches=2, chunk=4, restarts=2)
    result = twice.generate(PROMPTS, seed=0)
    once = make(ChunkBeamSearch, beams=2, branches=2, chunk=4).generate(PROMPTS, seed=0)
    for both, first in zip(tokens_of(result), tokens_of(once), strict=True):
        assert both[: len(first)] == first
        assert both[len(first) :] != first
    assert [c.samples for c in result.curves[0]] == [8, 16]
    assert [c.tokens for c in result.curves[0]] == [32, 64]


# ---- budgets ---------------------------------------------------------------------------------


def test_budgets() -> None:
    from tta_ext.decoding.search.aisp import AISPSettings
    from tta_ext.decoding.search.best_of_n import BestOfNSettings
    from tta_ext.decoding.search.chunk_beam import ChunkBeamSettings
    from tta_ext.decoding.search.reward_guided import RewardGuidedSettings

    assert AISPSettings(n=16).for_samples(100).schedule() == [16] * 6
    assert sum(BestOfNSettings(group=16).for_samples(100).schedule()) == 100
    assert ChunkBeamSettings().for_samples(100).schedule() == [16] * 6
    one = RewardGuidedSettings().for_samples(100)
    assert (one.schedule(), one.decoding) == ([100], "sample")
    for settings in (
        AISPSettings(), BestOfNSettings(group=8), ChunkBeamSettings(), RewardGuidedSettings()
    ):  # fmt: skip
        timed = settings.for_seconds(2.0)
        assert timed.max_seconds == 2.0
        assert 500 < len(timed.schedule()) <= rng.ITERATIONS
    with pytest.raises(ValueError, match="samples is 8, expected at least 16"):
        AISPSettings().for_samples(8)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (BestOfN, {"n": 0}, "n is 0"),
        (BestOfN, {"group": 0}, "group is 0"),
        (BestOfN, {"soft": -1.0}, "soft is -1.0"),
        (BestOfN, {"n": 70000}, "n is 70000, expected 1 to 65536"),
        (RewardGuidedSearch, {"candidates": 0}, "candidates is 0"),
        (RewardGuidedSearch, {"weight": math.nan}, "weight is nan"),
        (RewardGuidedSearch, {"top_k": 3}, "ARGS chooses among its candidates"),
        (ChunkBeamSearch, {"beams": 0}, "beams is 0"),
        (ChunkBeamSearch, {"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_settings(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(method, **options)

"""Rows in flight: when they end, what becomes of logits that make no law, and the seams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import base_model, make_model, make_tokenizer, proxy_model, ragged_prompts
from torch import Tensor

import tta_ext
from tta_ext import ops
from tta_ext.decoding import (
    AdaptiveImportanceSampling,
    BestOfN,
    ChunkBeamSearch,
    Generation,
    KnapsackDeferral,
    RewardGuidedSearch,
)
from tta_ext.decoding.deferral.step import deferral_step
from tta_ext.decoding.runtime.rows import Limits, Rows
from tta_ext.decoding.search.engine import (
    LocalEngine,
    RolloutBatch,
    RolloutJob,
    RolloutTask,
    Scores,
)
from tta_ext.rules import Rule

NEW = 12
RULES: list[dict[str, Any]] = [
    {"rule": "knapsack", "param": 0.6},
    {"rule": "threshold", "param": 0.05},
    {"rule": "confidence_bet", "param": 0.05},
    {"rule": "implicit_reward", "param": 0.7},
]
METHODS = (AdaptiveImportanceSampling, BestOfN, ChunkBeamSearch, RewardGuidedSearch)


def rule_name(options: dict[str, Any]) -> str:
    return options["rule"]


def test_rows_end_and_leave() -> None:
    rows = Rows([4, 2, 1], Limits(3, frozenset([9])), lambda i: f"prompt {i}")
    assert rows.emit([0, 1, 2], [5, 9, 5], lambda row: {}) == [1]
    assert rows.drop([1]) == [0, 2]
    assert rows.active == [0, 2]
    assert rows.emit([1], [6], lambda row: {}) == []
    assert rows.emit([0, 1], [7, 8], lambda row: {}) == [1]
    assert rows.tokens == [[5, 7], [9], [5, 6, 8]]
    assert rows.finish == ["", "eos", "length"]
    rows.branch([0, 2])
    assert (rows.active, rows.tokens, rows.finish) == ([0, 1], [[5, 7], [5, 6, 8]], ["", ""])
    rows.tokens[0].append(1)
    assert rows.tokens[1] == [5, 6, 8]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_draw_that_failed_names_prompt_position_and_model(bad: float) -> None:
    good, broken = torch.zeros(3), torch.zeros(3)
    broken[:] = bad if bad < 0 else 0.0
    broken[1] = bad
    logits = {"base": good, "proxy": broken}
    rows = Rows([4, 2], Limits(3), lambda i: f"prompt {i}")
    rows.emit([0, 1], [5, 5], lambda row: logits)
    message = "logits of proxy for prompt 1, position 3, have NaN or \\+inf, or no finite value"
    with pytest.raises(ValueError, match=message):
        rows.emit([1], [-1], lambda row: logits)
    assert rows.tokens == [[5], [5]]
    rows = Rows([4, 2], Limits(3), lambda i: f"prompt {i}", "finish")
    assert rows.emit([0, 1], [5, -1], lambda row: logits) == [1]
    assert rows.finish == ["", "error"]
    assert rows.tokens == [[5], []]
    assert list(rows.errors) == [1]
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected at least 1"):
        Limits(0)
    with pytest.raises(ValueError, match="errors is 'ignore', expected one of raise, finish"):
        Rows([1], Limits(1), str, "ignore")


@contextmanager
def spoiled(model: Any, token: int) -> Iterator[None]:
    """The model gives NaN for every row that has read a token."""
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        kept = weight[token].clone()
        weight[token] = torch.nan
    try:
        yield
    finally:
        with torch.no_grad():
            weight[token] = kept


def lonely(prompts: list[list[int]], result: Generation) -> tuple[int, int]:
    """An answer and a place in it whose token no other answer and no prompt has."""
    for row, tokens in enumerate(result.tokens):
        others = {t for i, p in enumerate(prompts) for t in p + result.tokens[i] * (i != row)}
        for place, token in enumerate(tokens[1:-3], 1):
            if token not in others and token not in tokens[:place]:
                return row, place
    raise AssertionError("no such token; take another seed")


@pytest.mark.parametrize("speculative", [None, 3])
@pytest.mark.parametrize("which", ["base", "proxy"])
@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_no_token_is_ever_minus_one(
    rule: dict[str, Any], do_sample: bool, which: str, speculative: int | None
) -> None:
    """On the CPU the loops ask the operators not to raise, as on CUDA, so this is that path."""
    base, proxy, prompts = make_model(seed=0), make_model(seed=3), ragged_prompts()
    kad = KnapsackDeferral(base, proxy, **rule)
    options: dict[str, Any] = {
        "seed": 5, "max_new_tokens": NEW, "eos_token_id": [], "do_sample": do_sample,
        "speculative": speculative,
    }  # fmt: skip
    clean = kad.generate(prompts, **options)
    row, place = lonely(prompts, clean)
    broken = base if which == "base" else proxy
    with spoiled(broken, clean.tokens[row][place]):
        result = kad.generate(prompts, errors="finish", **options)
        others = [i for i in range(len(prompts)) if i != row]
        assert [result.tokens[i] for i in others] == [clean.tokens[i] for i in others]
        answer = result.tokens[row]
        assert answer == clean.tokens[row][: len(answer)]
        assert len(answer) > place
        assert min(min(tokens) for tokens in result.tokens) >= 0
        assert [len(t) for t in result.tokens] == [len(d) for d in result.deferred]
        if len(answer) < NEW:
            assert result.finish[row] == "error"
            position = len(prompts[row]) + len(answer)
            where = f"logits of {which} for prompt {row}, position {position}, have NaN"
            assert where in result.errors[row]
            with pytest.raises(ValueError, match=where):
                kad.generate(prompts, **options)
        else:
            # The lazy proxy was never asked again.
            assert which == "proxy"
            assert not any(clean.deferred[row][place + 1 :])
        if which == "base":
            assert len(answer) == place + 1


def test_errors_are_numbered_over_batches_and_answers() -> None:
    base, prompts = make_model(seed=0), [[5, 6], [7, 8], [5, 9]]
    kad = KnapsackDeferral(base, make_model(seed=3))
    with spoiled(base, 9):
        result = kad.generate(
            prompts, errors="finish", num_return_sequences=2, batch_size=2, seed=0,
            max_new_tokens=1, eos_token_id=[], trace=True,
        )  # fmt: skip
        events = list(kad.stream([[5, 9]], errors="finish", seed=0, max_new_tokens=2))
    assert sorted(result.errors) == [4, 5]
    assert "prompt 2, answer 1, position 2" in result.errors[5]
    assert result.finish == ["length"] * 4 + ["error"] * 2
    assert [len(t) for t in (result.trace or [])] == [1, 1, 1, 1, 0, 0]
    assert [(e.token, e.finish) for e in events] == [(-1, "error")]


def test_a_prompt_is_run_once_for_all_its_answers_in_batches_too() -> None:
    kad = KnapsackDeferral(base_model(), proxy_model(), param=0.0)
    options: dict[str, Any] = {
        "num_return_sequences": 4, "max_new_tokens": 2, "seed": 0, "eos_token_id": [],
    }  # fmt: skip
    prompts = [[5 + i % 50 for i in range(60)], [7, 8]]
    whole, parts = (kad.generate(prompts, batch_size=size, **options) for size in (None, 1))
    assert parts.tokens == whole.tokens
    assert parts.stats.base_tokens == whole.stats.base_tokens < 100


@pytest.mark.parametrize("where", ["call", "constructor"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "knapsack", "param": [-0.1, 0.2]}, r"param is -0\.1, expected a budget >= 0"),
        ({"rule": "knapsack", "param": torch.tensor([0.1, -0.2])}, "expected a budget >= 0"),
        ({"param": [0.1, float("nan")]}, "param is nan, expected a number"),
        ({"rule": "implicit_reward", "param": float("nan")}, "expected finite betas"),
        ({"rule": "implicit_reward", "param": 1.0, "critical": "bogus"}, "critical is 'bogus'"),
        ({"rule": "token_max", "param": 0.3}, "expected None for rule 'argmax'"),
    ],
)
def test_a_bad_parameter_is_not_laid_on_the_model(
    where: str, options: dict[str, Any], message: str
) -> None:
    given = options if where == "constructor" else {}

    def run() -> None:
        kad = KnapsackDeferral(base_model(), proxy_model(), **given)
        kad.generate([[5], [6]], seed=0, errors="finish", **options)

    with pytest.raises(ValueError, match=message):
        run()


def test_an_alias_of_argmax_needs_no_parameter() -> None:
    keys: dict[str, Any] = {"seed": 1, "max_new_tokens": 5, "eos_token_id": []}
    pair = base_model(), proxy_model()
    named = KnapsackDeferral(*pair, rule="argmax", param=None).generate([[5, 6]], **keys)
    assert (
        KnapsackDeferral(*pair, rule="token_max").generate([[5, 6]], **keys).tokens == named.tokens
    )
    other = KnapsackDeferral(*pair).generate([[5, 6]], rule="token_max", **keys)
    assert other.tokens == named.tokens


def test_arguments_that_do_not_go_together() -> None:
    kad, ids = KnapsackDeferral(base_model(), proxy_model()), torch.tensor([[5, 6]])
    for options, message in (
        ({"input_ids": ids, "proxy_prompts": [[5]]}, "proxy_prompts go with prompts"),
        ({"prompts": [[5]], "attention_mask": ids}, "attention_mask goes with input_ids"),
        ({"prompts": [[5]], "proxy_attention_mask": ids}, "proxy_attention_mask goes with"),
        ({"prompts": [[5]], "rule": tta_ext.Rule(), "param": [0.1, 0.2]}, "rule is a Rule, which"),
    ):
        with pytest.raises(ValueError, match=message):
            kad.generate(**options)
    with pytest.raises(ValueError, match="rule is a Rule, which"):
        KnapsackDeferral(base_model(), proxy_model(), rule=tta_ext.Rule(), param=torch.ones(2))


def test_streams_give_all_text_of_an_answer_that_failed() -> None:
    base, tokenizer = make_model(seed=0), make_tokenizer()
    kad = KnapsackDeferral(base, make_model(seed=3), tokenizer)
    keys: dict[str, Any] = {
        "seed": 5, "max_new_tokens": NEW, "eos_token_id": [], "errors": "finish",
    }  # fmt: skip
    prompts = ragged_prompts()
    clean = kad.generate(prompts, **keys)
    row, place = lonely(prompts, clean)
    last = clean.tokens[row][place]
    keys["stop_strings"] = tokenizer.decode([last]) + "~~~"  # held back until it is clear
    with spoiled(base, last):
        whole = kad.generate([prompts[row]], sequence=[row], **keys)
        events = list(kad.stream([prompts[row]], sequence=[row], **keys))
    assert whole.finish == ["error"]
    assert "".join(event.text or "" for event in events) == whole.text


def test_searches_number_prompts_over_groups_and_check_all_first() -> None:
    asked: list[Any] = []

    def reward(prompts: list[Any], responses: list[Any]) -> list[float]:
        asked.extend(prompts)
        return [0.0] * len(responses)

    model = make_model(seed=0)
    search = BestOfN(model, reward, n=2, batch_size=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 2 has the id 9999"):
        search.generate([[5], [6], [9999]], seed=0)
    assert not asked
    with spoiled(model, 9), pytest.raises(ValueError, match="for prompt 2, rollout 0, position 1"):
        search.generate([[5], [6], [9]], seed=4, eos_token_id=[])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_search_names_the_rollout(method: Any) -> None:
    model = make_model(seed=0)
    search = (
        method(model, lambda p, r: [float(len(x)) for x in r], max_new_tokens=4, n=2)
        if (method is not ChunkBeamSearch)
        else method(model, lambda p, r: [float(len(x)) for x in r], max_new_tokens=4, chunk=2)
    )
    with (
        spoiled(model, 9),
        pytest.raises(ValueError, match="logits of the model for prompt 1, rollout 0, position 2,"),
    ):
        search.generate([[5, 6], [5, 9]], seed=0, eos_token_id=[])


# ---- seams for foreign engines ---------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", ["knapsack", "threshold", "nudging", "relative"])
def test_a_step_is_the_operator_whether_the_proxy_is_there_or_asked(
    name: str, do_sample: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    base, proxy = 3 * torch.randn(2, 16, 50, generator=generator)
    rule = Rule(name, torch.linspace(0.1, 0.9, 16, dtype=torch.float64))
    keys: dict[str, Any] = {
        "seed": 4, "position": torch.arange(16), "sequence": torch.arange(16) + 3,
        "do_sample": do_sample,
    }  # fmt: skip
    expected = ops.deferral_sample(base, proxy, rule=rule, **keys)
    asked: list[list[int]] = []

    def ask(rows: list[int] | None, index: Tensor | None) -> Tensor:
        asked.append(list(range(16)) if rows is None else rows)
        return proxy if index is None else proxy[index]

    there = deferral_step(base, proxy, rule, **keys)
    lazy = deferral_step(base, ask, rule, **keys)
    assert there.token.tolist() == lazy.token.tolist() == expected.token.tolist()
    assert there.tokens == lazy.tokens == expected.token.tolist()
    assert there.from_proxy == lazy.from_proxy == expected.deferred.tolist()
    assert len(asked) == 1
    assert set(asked[0]) >= {i for i, flag in enumerate(lazy.from_proxy) if flag}


def test_a_step_marks_rows_without_a_law() -> None:
    base, proxy = torch.zeros(2, 3, 5)
    base[1, 2] = torch.nan
    drawn = deferral_step(
        base, proxy, Rule("threshold", 0.1), seed=0, position=torch.arange(3),
        sequence=torch.arange(3),
    )  # fmt: skip
    assert [t < 0 for t in drawn.token.tolist()] == [False, True, False]


class Shards:
    """An engine that draws each job's halves by two engines of its own."""

    def __init__(self, model: Any, task: RolloutTask) -> None:
        self.parts = [LocalEngine(model, task), LocalEngine(model, task)]
        self.device, self.dimensions = self.parts[0].device, self.parts[0].dimensions
        self.jobs = 0

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def roll(self, job: RolloutJob, on_finish: Any) -> RolloutBatch:
        self.jobs += 1
        half = len(job.cells) // 2
        out = []
        for part, (a, b) in zip(self.parts, ((0, half), (half, len(job.cells))), strict=True):
            piece = RolloutJob(job.cells[a:b], job.iteration, job.noise, job.metered)
            out.append((a, part.roll(piece, lambda i, tokens, a=a: on_finish(a + i, tokens))))
        return RolloutBatch(
            [t for _, one in out for t in one.tokens],
            [f for _, one in out for f in one.finish],
            torch.cat([one.dot for _, one in out]),
            torch.cat([one.common_dot for _, one in out]),
            {a + i: kl for a, one in out for i, kl in one.kl.items()},
        )


class Scoring(Shards):
    """One that scores its rollouts too, and moves u by partial sums."""

    def __init__(self, model: Any, task: RolloutTask) -> None:
        super().__init__(model, task)
        assert task.scorer is not None
        self.scorer = task.scorer

    def roll(self, job: RolloutJob, on_finish: Any) -> RolloutBatch:
        stream, texts = self.scorer.stream(), {}

        def ask(i: int, tokens: list[int]) -> None:
            texts[i] = self.scorer.ask(stream, i, job.cells[i][0], tokens)

        batch, found = super().roll(job, ask), stream.collect()
        rows = range(len(job.cells))
        said = [texts[i] for i in rows], [found[i] for i in rows]
        batch.scores = Scores(*said, stream.seconds, stream.calls)
        return batch

    def control_update(self, mean: Tensor, weights: Tensor, **given: Any) -> Tensor:
        spans = [(0, 2), (2, 4)]
        parts = [ops.control_update(mean, weights, rollouts=span, **given) for span in spans]
        return ops.control_merge(mean, torch.stack(parts), given["sigma"])


@pytest.mark.parametrize("kind", [Shards, Scoring])
def test_a_foreign_engine_draws_the_same_rollouts(kind: Any) -> None:
    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(text.count("e")) for text in responses]

    options: dict[str, Any] = {
        "n": 4, "iterations": 3, "sigma": 0.5, "lam": 0.5, "coherence": 0.5, "max_new_tokens": 6,
    }  # fmt: skip
    results = [
        AdaptiveImportanceSampling(
            base_model(), reward, make_tokenizer(), engine=engine, **options
        ).generate(["ab", "the"], seed=2)
        for engine in (LocalEngine, kind)
    ]
    here, there = results
    assert [c.tokens for row in here.candidates for c in row] == [
        c.tokens for row in there.candidates for c in row
    ]
    assert here.rewards == there.rewards
    assert here.texts == there.texts
    assert here.timing.reward_items == there.timing.reward_items
    assert here.mean is not None
    assert there.mean is not None
    assert torch.equal(here.mean, there.mean)
    assert [r.kl for r in here.curves[0]] == pytest.approx([r.kl for r in there.curves[0]])
    with pytest.raises(ValueError, match="ChunkBeamSearch looks at rollouts token by token"):
        ChunkBeamSearch(base_model(), reward, engine=Shards)

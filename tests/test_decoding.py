"""The decoding loop against plain transformers, against its definition, and against itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import (
    NEW,
    VOCABULARY,
    answer,
    base_model,
    greedy,
    make_model,
    next_logits,
    proxy_model,
    ragged_prompts,
)

import tta_ext
from tta_ext import ops, rng
from tta_ext.decoding import DecodeStats, KnapsackDeferral
from tta_ext.decoding.runtime.prompts import encode_prompts

RULES = [
    ("knapsack", 0.4, "exclude"),
    ("knapsack", 0.4, "split"),
    ("threshold", 0.05, "exclude"),
    ("nudging", 0.2, "exclude"),
    ("relative", 0.1, "exclude"),
    ("argmax", None, "exclude"),
    ("confidence_bet", 0.05, "exclude"),
    ("proxy_below", 0.0, "exclude"),
    ("proxy_above", -0.05, "exclude"),
    ("relative_ratio", 0.4, "exclude"),
    ("optimal", -0.2, "exclude"),
]


# ---- the loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_rule_that_never_defers_is_the_base_alone(kad: KnapsackDeferral, do_sample: bool) -> None:
    result = answer(kad, rule="threshold", param=0.0, do_sample=do_sample)
    assert not any(map(any, result.deferred))
    assert result.stats.proxy_calls == 0
    assert result.stats.proxy_calls_saved == result.stats.steps == NEW
    if not do_sample:
        assert result.tokens == [greedy(base_model(), p, NEW) for p in ragged_prompts()]


@pytest.mark.parametrize("lazy", [True, False])
def test_a_rule_that_always_defers_is_the_proxy_alone(kad: KnapsackDeferral, lazy: bool) -> None:
    result = answer(kad, rule="knapsack", param=1.0, do_sample=False, lazy=lazy)
    assert all(map(all, result.deferred))
    assert result.tokens == [greedy(proxy_model(), p, NEW) for p in ragged_prompts()]
    assert result.stats.deferral_rate == 1.0


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(("rule", "param", "critical"), RULES)
def test_tokens_follow_the_definition(
    kad: KnapsackDeferral, rule: str, param: float | None, critical: str, do_sample: bool
) -> None:
    """Each token is what the op draws from logits without caches, batches or laziness."""
    prompts = ragged_prompts()[:3]
    options = {"rule": rule, "param": param, "critical": critical, "do_sample": do_sample}
    result = answer(kad, prompts, sequence=[5, 0, 2**32 - 1], temperature=0.8, **options)
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        for token, deferred in zip(result.tokens[row], result.deferred[row], strict=True):
            drawn = ops.deferral_sample(
                next_logits(base_model(), tokens),
                next_logits(proxy_model(), tokens),
                **options,
                temperature=0.8,
                seed=3,
                position=len(tokens),
                sequence=result.sequence[row],
            )
            assert (token, deferred) == (int(drawn.token), bool(drawn.deferred))
            tokens.append(token)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(("rule", "param", "critical"), [RULES[1], RULES[2], RULES[3], RULES[6]])
def test_neither_batch_nor_laziness_nor_trace_changes_tokens(
    kad: KnapsackDeferral, rule: str, param: float, critical: str, do_sample: bool
) -> None:
    options = {"rule": rule, "param": param, "critical": critical, "do_sample": do_sample}
    whole = answer(kad, **options)
    dense = answer(kad, lazy=False, **options)
    traced = answer(kad, trace=True, **options)
    chunked = answer(kad, batch_size=2, **options)
    for other in (dense, traced, chunked):
        assert other.tokens == whole.tokens
        assert other.deferred == whole.deferred
    order = [3, 0, 4]
    some = answer(kad, [ragged_prompts()[i] for i in order], sequence=order, **options)
    assert some.tokens == [whole.tokens[i] for i in order]
    one = answer(kad, [ragged_prompts()[2]], sequence=[2], **options)
    assert one.tokens[0] == whole.tokens[2]


def test_rows_leave_when_done_and_the_others_do_not_notice(kad: KnapsackDeferral) -> None:
    options = {"rule": "knapsack", "param": 0.4, "max_new_tokens": 14}
    free = answer(kad, **options)
    ends = [free.tokens[0][2], free.tokens[3][5]]
    result = answer(kad, eos_token_id=ends, **options)
    cut = []
    for tokens in free.tokens:
        at = next((i for i, t in enumerate(tokens) if t in ends), None)
        cut.append(tokens if at is None else tokens[: at + 1])
    assert result.tokens == cut
    assert result.finish == ["length" if len(t) == 14 and t[-1] not in ends else "eos" for t in cut]
    assert len(set(map(len, cut))) > 1
    assert result.stats.tokens == sum(map(len, cut))


def test_a_parameter_for_each_row(kad: KnapsackDeferral) -> None:
    params = [0.0, 0.3, 1.0, 0.6, 0.1]
    for do_sample in (True, False):
        result = answer(kad, rule="knapsack", param=params, do_sample=do_sample)
        for row, param in enumerate(params):
            alone = answer(
                kad, [ragged_prompts()[row]], rule="knapsack", param=param, sequence=[row],
                do_sample=do_sample,
            )  # fmt: skip
            assert alone.tokens[0] == result.tokens[row]
    ends = [answer(kad, rule="knapsack", param=params).tokens[0][1]]
    cut = answer(kad, rule="knapsack", param=params, eos_token_id=ends)
    whole = answer(kad, rule="knapsack", param=params)
    assert all(full[: len(t)] == t for t, full in zip(cut.tokens, whole.tokens, strict=True))
    with pytest.raises(ValueError, match="param has 2 values, expected 1, 5"):
        answer(kad, param=[0.1, 0.2])


def test_several_answers_to_a_prompt(kad: KnapsackDeferral) -> None:
    prompts = ragged_prompts()[:2]
    result = answer(kad, prompts, num_return_sequences=3, rule="knapsack", param=0.5)
    repeated = answer(kad, [p for p in prompts for _ in range(3)], rule="knapsack", param=0.5)
    assert result.tokens == repeated.tokens
    assert len({tuple(t) for t in result.tokens[:3]}) == 3
    assert result.stats.base_tokens == sum(len(p) - 1 for p in prompts) + 6 * NEW
    by_prompt = answer(kad, prompts, num_return_sequences=3, rule="knapsack", param=[0.0, 0.5])
    assert by_prompt.tokens[3:] == result.tokens[3:]


def test_seeds(kad: KnapsackDeferral) -> None:
    assert answer(kad, seed=1).tokens == answer(kad, seed=1).tokens != answer(kad, seed=2).tokens
    assert answer(kad, seed=-1).tokens == answer(kad, seed=2**64 - 1).tokens
    torch.manual_seed(11)
    first = answer(kad, seed=None)
    second = answer(kad, seed=None)
    torch.manual_seed(11)
    again = answer(kad, seed=None)
    assert first.tokens == again.tokens != second.tokens
    assert answer(kad, seed=first.seed).tokens == first.tokens
    with_generator = answer(kad, seed=torch.Generator().manual_seed(4))
    assert with_generator.seed == rng.seed_from_generator(torch.Generator().manual_seed(4))


def test_lazy_proxy_saves_calls_and_counts_them(kad: KnapsackDeferral) -> None:
    options = {"rule": "knapsack", "param": 0.15, "max_new_tokens": 16}
    lazy = answer(kad, ragged_prompts()[:2], **options)
    dense = answer(kad, ragged_prompts()[:2], lazy=False, **options)
    stats = lazy.stats
    deferred = sum(map(sum, lazy.deferred))
    assert 0 < deferred < stats.tokens
    steps = [lazy.deferred[0][t] or lazy.deferred[1][t] for t in range(16)]
    assert stats.proxy_calls_saved == 16 - sum(steps)
    assert stats.proxy_calls == sum(steps) + 1  # one for the prompts
    assert stats.proxy_rows_saved == stats.tokens - deferred
    # Every token is fed once, and none after the last one whose successor was asked for.
    fed = 0
    for prompt, flags in zip(ragged_prompts(), lazy.deferred[:2], strict=False):
        asked = [step for step, flag in enumerate(flags) if flag]
        fed += len(prompt) + asked[-1] if asked else len(prompt) - 1
    assert stats.proxy_tokens == fed < dense.stats.proxy_tokens
    assert dense.stats.proxy_calls == 16 + 1
    assert stats.base_calls == dense.stats.base_calls == 17
    assert 0 <= stats.other_seconds < stats.seconds
    total = stats + dense.stats
    assert total.tokens == 64
    assert set(DecodeStats().as_dict()) >= {"tokens", "other_share", "deferral_rate"}


def test_trace_accounts_for_every_token(kad: KnapsackDeferral) -> None:
    prompt = ragged_prompts()[0]
    options: dict[str, Any] = {"rule": "knapsack", "param": 0.3, "temperature": 0.9}
    result = answer(kad, [prompt], trace=True, **options)
    assert result.trace is not None
    tokens = list(prompt)
    for one, deferred in zip(result.trace[0], result.deferred[0], strict=True):
        base, proxy = next_logits(base_model(), tokens), next_logits(proxy_model(), tokens)
        stats = ops.deferral_stats(base, **options)
        assert one.source == ("proxy" if deferred else "base")
        assert one.p == pytest.approx(float(torch.softmax(base / 0.9, -1)[0, one.token]), rel=1e-3)
        assert one.q == pytest.approx(float(torch.softmax(proxy / 0.9, -1)[0, one.token]), rel=1e-3)
        assert one.deferred_mass == pytest.approx(float(stats.deferred_mass), rel=1e-3)
        assert one.deferred_mass <= 0.3
        assert one.critical == int(stats.critical)
        p = torch.softmax(base / 0.9, -1)[0]
        assert one.cut == pytest.approx(float(p[one.critical]), rel=1e-3)
        mask = ops.deferral_mask(base, **options).mask[0]
        best = [law.topk(5).indices.tolist() for law in (p, torch.softmax(proxy / 0.9, -1)[0])]
        assert [c.token for c in one.candidates] == list(dict.fromkeys(best[0] + best[1]))
        assert [c.mu for c in one.candidates] == [float(mask[c.token]) for c in one.candidates]
        for choice in one.candidates:
            assert choice.p == pytest.approx(float(p[choice.token]), rel=1e-3)
        tokens.append(one.token)
    lazy = answer(kad, [prompt], trace="lazy", **options)
    assert lazy.trace is not None
    assert [t.q is None for t in lazy.trace[0]] == [not d for d in lazy.deferred[0]]
    assert answer(kad, [prompt]).trace is None
    dense = answer(kad, rule="confidence_bet", param=0.1, trace=True)
    assert all(t.q is not None and t.critical is None for t in dense.trace[2])
    for one in dense.trace[2]:
        # p(v) < max q - margin: the cut is the least likely token that is kept.
        limit = max(c.q for c in one.candidates if c.q is not None) - 0.1
        assert all(c.mu == (c.p < limit) for c in one.candidates if abs(c.p - limit) > 1e-6)
        assert one.cut is None or one.cut >= limit - 1e-6
    split = answer(kad, [prompt], trace=True, rule="knapsack", param=0.98, critical="split")
    assert split.trace is not None
    shares = [c.mu for one in split.trace[0] for c in one.candidates if c.token == one.critical]
    assert shares
    assert all(0 <= share <= 1 for share in shares)


def test_implicit_reward() -> None:
    base, expert, anti = base_model(), proxy_model(), make_model(seed=2)
    prompts = ragged_prompts()[:3]
    kad = KnapsackDeferral(base, [expert], rule="implicit_reward", param=0.7, anti=[anti])
    result = answer(kad, prompts, temperature=0.9)
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        for token in result.tokens[row]:
            drawn = ops.implicit_reward_sample(
                next_logits(base, tokens),
                next_logits(expert, tokens)[None],
                next_logits(anti, tokens)[None],
                torch.tensor([0.7]),
                temperature=0.9,
                seed=3,
                position=len(tokens),
                sequence=row,
            )
            assert token == int(drawn)
            tokens.append(token)
    # An expert against itself changes nothing; eight rows leave at different times.
    same = KnapsackDeferral(base, [expert, anti], rule="implicit_reward", param=[1.0, 0.5],
                            anti=[expert, anti])  # fmt: skip
    plain = KnapsackDeferral(base, expert, rule="threshold", param=0.0)
    ends = [answer(plain, do_sample=False).tokens[0][2]]
    one = answer(same, do_sample=False, eos_token_id=ends)
    assert one.tokens == answer(plain, do_sample=False, eos_token_id=ends).tokens
    ensemble = KnapsackDeferral(base, [expert, anti], rule="implicit_reward", param=0.5)
    assert answer(ensemble).stats.proxy_calls == 2 * (NEW + 1)
    with pytest.raises(ValueError, match="expected 2, one for each expert"):
        answer(ensemble, param=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="has no trace"):
        answer(ensemble, trace=True)
    with pytest.raises(ValueError, match="one proxy and no anti"):
        KnapsackDeferral(base, [expert, anti], rule="threshold")


# ---- errors, profiling -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nucleus"}, "rule is 'nucleus', expected one of knapsack"),
        ({"critical": "half"}, "critical is 'half'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequence": [1, 2]}, "sequence has 2 ids, expected 5"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"trace": "some"}, "trace is 'some'"),
        ({"max_new_tokens": 600}, "has only 512 positions"),
        ({"stop_strings": "x"}, "need a tokenizer"),
        ({"temperature": 0.0}, "temperature"),
        ({"rule": "knapsack", "param": -0.5}, "param"),
        ({"proxy_prompts": [[5]]}, "5 prompts and 1 proxy prompts"),
    ],
)
def test_bad_options(kad: KnapsackDeferral, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(kad, **options)


def test_bad_prompts(kad: KnapsackDeferral) -> None:
    with pytest.raises(ValueError, match="prompt 0 is text and there is no tokenizer"):
        kad.generate("hello")
    with pytest.raises(ValueError, match=f"prompt 1 has the id {VOCABULARY + 9}"):
        kad.generate([[5], [5, VOCABULARY + 9]])
    with pytest.raises(ValueError, match="either prompts or input_ids"):
        kad.generate()
    with pytest.raises(TypeError, match="prompts is a int"):
        kad.generate(5)
    with pytest.raises(TypeError, match="unexpected argument 'top_q'"):
        kad.generate([[5]], top_q=1)
    with pytest.raises(TypeError, match=r"input_ids is a torch\.float32 Tensor"):
        kad.generate(input_ids=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        kad.generate(input_ids=torch.ones(1, 2).long(), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="is empty and the tokenizer has no bos"):
        encode_prompts([""], _Empty())


class _Empty:
    bos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


def test_broken_logits_name_the_row(kad: KnapsackDeferral) -> None:
    model = make_model(seed=8)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    broken = KnapsackDeferral(model, proxy_model(), probe=False)
    message = "logits of base for prompt 0, position 9, have NaN or \\+inf, or no finite value"
    with pytest.raises(ValueError, match=message):
        answer(broken)


def test_profiler_ranges(kad: KnapsackDeferral) -> None:
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            answer(kad, rule="knapsack", param=0.6, max_new_tokens=4)
    names = {event.key for event in profiler.key_averages()}
    assert {"tta_ext::base", "tta_ext::proxy", "tta_ext::propose", "tta_ext::replace"} <= names


def test_generation_keeps_no_inference_tensors_and_leaves_grad_mode(kad: KnapsackDeferral) -> None:
    result = answer(kad)
    assert torch.is_grad_enabled()
    assert not result.sequences().is_inference()
    stream = kad.stream([[5, 6]], max_new_tokens=3, seed=0)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.requires_cuda
def test_cuda_loop() -> None:
    device = torch.device("cuda")
    base, proxy = make_model(seed=0).to(device), make_model(seed=1).to(device)
    kad = KnapsackDeferral(base, proxy, rule="knapsack", param=1.0)
    result = answer(kad, do_sample=False)
    expected = answer(KnapsackDeferral(make_model(seed=0), make_model(seed=1)), rule="knapsack",
                      param=1.0, do_sample=False)  # fmt: skip
    assert result.tokens == expected.tokens
    sampled = answer(kad, param=0.4, lazy=True)
    assert sampled.tokens == answer(kad, param=0.4, lazy=False).tokens
    mixed = KnapsackDeferral(base, make_model(seed=1), rule="knapsack", param=0.4)
    assert len(answer(mixed).tokens) == 5


def test_public_names() -> None:
    assert tta_ext.KnapsackDeferral is KnapsackDeferral

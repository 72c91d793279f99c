"""The decoding loop against plain transformers, against its definition, and against itself."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    EOS,
    VOCABULARY,
    base_model,
    greedy,
    make_model,
    make_tokenizer,
    next_logits,
    proxy_model,
    ragged_prompts,
)

import tta_ext
from tta_ext import ops, rng
from tta_ext.decoding import (
    DecodeStats,
    Generation,
    KnapsackDeferral,
    align_vocabularies,
    load_model,
)
from tta_ext.decoding.runtime.attention import check_model
from tta_ext.decoding.runtime.probe import probe_model
from tta_ext.decoding.runtime.processors import SequenceView
from tta_ext.decoding.runtime.prompts import encode_prompts, unpad
from tta_ext.decoding.runtime.runner import Runner

NEW = 10
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
]


@pytest.fixture(scope="module")
def kad() -> KnapsackDeferral:
    return KnapsackDeferral(base_model(), proxy_model())


def answer(kad: KnapsackDeferral, prompts: Any = None, **options: Any) -> Generation:
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "eos_token_id": []}
    return kad.generate(ragged_prompts() if prompts is None else prompts, **(defaults | options))


# ---- the ragged cache under one model ----------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_of_different_length_decode_as_alone(kind: str) -> None:
    model, prompts = make_model(kind), ragged_prompts()
    expected = [greedy(model, prompt, NEW) for prompt in prompts]
    probe_model(model, "base")
    with torch.inference_mode():
        runner = Runner(model, prompts, room=NEW, vocabulary=VOCABULARY)
        runner.prefill()
        found: list[list[int]] = [[] for _ in prompts]
        for _ in range(NEW):
            token = runner.step().argmax(-1)
            runner.append(token.tolist(), token)
            for row, one in enumerate(token.tolist()):
                found[row].append(one)
    assert found == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "gemma3", "chunked"])
def test_rows_may_lag_leave_and_outgrow_the_buffers(kind: str) -> None:
    model, prompts = make_model(kind), ragged_prompts()
    expected = [greedy(model, prompt, 16) for prompt in prompts]
    random.seed(5)
    with torch.inference_mode():
        runner = Runner(model, prompts, room=16, vocabulary=VOCABULARY)
        runner.cache.capacity = 4  # must grow several times
        rows, warm, seen = list(range(len(prompts))), False, 0
        for step in range(16):
            asked = [i for i in range(len(rows)) if random.random() < 0.4]
            if step == 9:
                runner.keep([0, 2, 3])
                rows, asked = [rows[0], rows[2], rows[3]], [0, 1]
            if asked:
                if not warm:
                    runner.prefill()
                    warm = True
                token = runner.catch_up(asked).argmax(-1).tolist()
                assert token == [expected[rows[i]][step] for i in asked]
                seen += len(asked)
            runner.append([expected[row][step] for row in rows])
    assert seen > 10


def test_equal_prompts_are_run_once() -> None:
    prompts = ragged_prompts()
    with torch.inference_mode():
        runner = Runner(base_model(), prompts, room=1, vocabulary=VOCABULARY)
        runner.prefill()
    assert runner.tokens_run == 8 + 2 + 13  # all but the last tokens, the equal prompt once


def test_reload_keeps_the_common_prefix() -> None:
    with torch.inference_mode():
        runner = Runner(base_model(), [[5, 6, 7, 8]], room=4, vocabulary=VOCABULARY)
        runner.prefill()
        runner.step()
        before = runner.tokens_run
        runner.reload([[5, 6, 9, 9, 9]], room=4)
        logits = runner.catch_up()
    assert runner.tokens_run - before == 3
    torch.testing.assert_close(logits, next_logits(base_model(), [5, 6, 9, 9, 9]))


def _configured(name: str, **options: Any) -> Any:
    import transformers

    config = getattr(transformers, name)(vocab_size=VOCABULARY, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, "takes no position_ids"),
        (
            "GPTNeoConfig",
            {"hidden_size": 16, "num_layers": 1, "num_heads": 2,
             "attention_types": [[["local"], 1]]},
            "longest row",
        ),
        ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 1}, "recurrent state"),
    ],
)  # fmt: skip
def test_models_that_cannot_lag_are_refused(name: str, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_model(_configured(name, **options), "base")


def test_other_models_are_refused() -> None:
    import transformers

    config = base_model().config
    with pytest.raises(ValueError, match="no language-model head"):
        check_model(transformers.AutoModel.from_config(config), "proxy")
    t5 = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_model(transformers.T5ForConditionalGeneration(t5), "base")
    with pytest.raises(TypeError, match="base is a str"):
        check_model("gpt2", "base")
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        check_model(model, "base")


def test_the_probe_finds_attention_that_ignores_its_mask() -> None:
    model = make_model(seed=4)
    forward = model.model.forward

    def deaf(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            attention_mask = torch.zeros_like(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = deaf
    with pytest.raises(ValueError, match="gives other logits"):
        KnapsackDeferral(base_model(), model)


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
        tokens.append(one.token)
    lazy = answer(kad, [prompt], trace="lazy", **options)
    assert lazy.trace is not None
    assert [t.q is None for t in lazy.trace[0]] == [not d for d in lazy.deferred[0]]
    assert answer(kad, [prompt]).trace is None
    dense = answer(kad, rule="confidence_bet", param=0.1, trace=True)
    assert all(t.q is not None and t.critical is None for t in dense.trace[2])


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


# ---- processors, criteria, stopping ------------------------------------------------------------


def test_logits_processors_apply_to_both_models_without_padding(kad: KnapsackDeferral) -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    seen: list[tuple[int, int]] = []

    def record(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(input_ids.shape))
        return scores.index_fill(1, torch.arange(4, 60), float("-inf"))

    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    options: dict[str, Any] = {"rule": "knapsack", "param": 0.5}
    options["logits_processor"] = LogitsProcessorList([record, penalty])
    whole = answer(kad, **options)
    assert all(token >= 60 or token < 4 for row in whole.tokens for token in row)
    assert {shape[1] - 9 for shape in seen} >= {0}
    assert max(shape[0] for shape in seen) == 2  # rows of equal length are processed together
    for row, prompt in enumerate(ragged_prompts()):
        alone = answer(kad, [prompt], sequence=[row], **options)
        assert alone.tokens[0] == whole.tokens[row]
    assert any(map(any, whole.deferred))
    single = answer(kad, logits_processor=record, rule="confidence_bet", param=0.0)
    assert all(token >= 60 or token < 4 for row in single.tokens for token in row)


def test_sequence_view_groups_rows() -> None:
    view = SequenceView([[1, 2], [3], [4, 5]], 3, torch.device("cpu"))
    shapes: list[tuple[int, ...]] = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return scores + ids.sum(1, keepdim=True)

    out = view.process(processor, torch.zeros(3, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert out[:, 0].tolist() == [3, 3, 9]
    assert sorted(shapes) == [(1, 1), (2, 2)]
    view.write([0, 1, 2], [7, 8, 9])
    view.keep([1, 2], torch.tensor([1, 2]))
    assert view.process(processor, torch.zeros(1, 4), [0])[:, 0].tolist() == [11]
    assert view.stopped(lambda ids, scores: ids[:, -1] == 9, torch.zeros(2, 4)) == [False, True]


def test_stopping_criteria(kad: KnapsackDeferral) -> None:
    def long_enough(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    result = answer(kad, stopping_criteria=[long_enough])
    lengths = [len(p) for p in ragged_prompts()]
    expected = [max(1, min(NEW, 12 - length)) for length in lengths]
    assert [len(t) for t in result.tokens] == expected
    assert result.finish == ["length" if n == NEW else "stop" for n in expected]


def test_stop_strings_across_tokens() -> None:
    tokenizer = make_tokenizer()
    kad = KnapsackDeferral(base_model(), proxy_model(), tokenizer)
    free = answer(kad, "hello", max_new_tokens=24)
    text = free.text
    stop = text[6:9]
    result = answer(kad, "hello", max_new_tokens=24, stop_strings=["never seen", stop])
    assert result.finish == ["stop"]
    assert result.text == text[: text.index(stop)]
    assert free.tokens[0][: len(result.tokens[0])] == result.tokens[0]


def test_both_models_may_end_an_answer() -> None:
    base, proxy = make_model(seed=0), make_model(seed=1)
    base.generation_config.eos_token_id = [EOS, 50]
    proxy.generation_config.eos_token_id = 60
    kad = KnapsackDeferral(base, proxy)
    result = kad.generate(
        ragged_prompts() * 4, max_new_tokens=60, seed=0, rule="knapsack", param=0.9
    )
    finals = {t[-1] for t, why in zip(result.tokens, result.finish, strict=True) if why == "eos"}
    assert finals <= {EOS, 50, 60}
    assert finals & {50, 60}
    assert not any({EOS, 50, 60} & set(t[:-1]) for t in result.tokens)


# ---- streams, conversations, prompts -----------------------------------------------------------


def test_stream_is_generate_piece_by_piece() -> None:
    kad = KnapsackDeferral(base_model(), proxy_model(), make_tokenizer())
    prompts = ["hi", "hello there", "x"]
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 5, "rule": "knapsack", "param": 0.4}
    whole = kad.generate(prompts, **options)
    tokens: list[list[int]] = [[], [], []]
    texts, finish = ["", "", ""], ["", "", ""]
    for event in kad.stream(prompts, batch_size=2, **options):
        tokens[event.row].append(event.token)
        texts[event.row] += event.text
        finish[event.row] = event.finish or finish[event.row]
    assert (tokens, texts, finish) == (whole.tokens, whole.texts, whole.finish)


def test_streamers_of_transformers() -> None:
    from transformers import TextIteratorStreamer

    tokenizer = make_tokenizer()
    kad = KnapsackDeferral(base_model(), proxy_model(), tokenizer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = answer(kad, "hello", streamer=streamer)
    assert "".join(streamer) == result.text
    puts: list[Any] = []
    sink = SimpleNamespace(
        put=lambda value: puts.append(value.tolist()), end=lambda: puts.append(None)
    )
    batch = answer(kad, ["ab", "cd"], streamer=sink)
    assert puts[0] == batch.prompt_tokens
    assert puts[-1] is None
    assert [list(column) for column in zip(*puts[1:-1], strict=True)] == batch.tokens


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHOUT = TEMPLATE.replace("{{ m.role }}", "{{ m.role | upper }}")


def test_each_model_reads_its_own_template() -> None:
    talk = [{"role": "user", "content": "hi"}]
    base_tokenizer, proxy_tokenizer = make_tokenizer(), make_tokenizer(template=SHOUT)
    kad = KnapsackDeferral(
        base_model(), proxy_model(), base_tokenizer, proxy_tokenizer=proxy_tokenizer,
        chat_template=TEMPLATE, proxy_chat_template=SHOUT,
    )  # fmt: skip
    result = answer(kad, talk, rule="knapsack", param=0.4)
    base_text, proxy_text = "user: hi\nassistant: ", "USER: hi\nassistant: "
    plain = answer(kad, [base_text], proxy_prompts=[proxy_text], rule="knapsack", param=0.4)
    assert result.tokens == plain.tokens
    assert result.prompt_tokens == [base_tokenizer(base_text)["input_ids"]]
    # A base without a template reads the proxy's.
    bare = encode_prompts([talk], base_tokenizer, fallback=proxy_tokenizer)
    assert bare == [proxy_tokenizer(proxy_text)["input_ids"]]
    with pytest.raises(ValueError, match="neither tokenizer has a chat template"):
        encode_prompts([talk], base_tokenizer)


def test_conversations_reuse_both_caches() -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    kad = KnapsackDeferral(base_model(), proxy_model(), tokenizer, rule="knapsack", param=0.4)
    chat = kad.chat(system="be brief", seed=9, max_new_tokens=8, eos_token_id=[])
    first = chat.send("hello")
    assert chat.last is not None
    cost = chat.last.stats.base_tokens
    second = chat.send("again")
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "again"},
    ]
    fresh = kad.generate([messages], seed=9, max_new_tokens=8, eos_token_id=[])
    assert second == fresh.text
    assert chat.last.tokens == fresh.tokens
    assert chat.messages == [*messages, {"role": "assistant", "content": second}]
    # Only the new turn is fed: the first answer's text lies in the cache already.
    assert chat.last.stats.base_tokens < fresh.stats.base_tokens - cost / 2
    streamed = "".join(event.text or "" for event in chat.stream("and again"))
    assert streamed == chat.messages[-1]["content"]
    chat.messages[1]["content"] = "edited"
    edited = chat.send("once more")
    fresh = kad.generate([chat.messages[:-1]], seed=9, max_new_tokens=8, eos_token_id=[])
    assert edited == fresh.text


def test_padded_batches(kad: KnapsackDeferral) -> None:
    prompts = ragged_prompts()
    for side in ("left", "right"):
        ids = torch.full((5, 14), 2)
        mask = torch.zeros(5, 14, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            place = slice(14 - len(prompt), 14) if side == "left" else slice(0, len(prompt))
            ids[row, place] = torch.tensor(prompt)
            mask[row, place] = 1
        assert unpad(ids, mask) == prompts
        padded = kad.generate(
            input_ids=ids, attention_mask=mask, seed=3, max_new_tokens=NEW, eos_token_id=[]
        )
        assert padded.tokens == answer(kad).tokens
    sequences = padded.sequences(pad_token_id=2)
    assert sequences.shape == (5, 14 + NEW)
    assert sequences[1].tolist() == [2] * 11 + prompts[1] + padded.tokens[1]


def test_empty_batch(kad: KnapsackDeferral) -> None:
    result = answer(kad, [])
    assert (result.tokens, len(result)) == ([], 0)
    assert list(kad.stream([])) == []


def test_source_spans() -> None:
    tokenizer = make_tokenizer()
    kad = KnapsackDeferral(base_model(), proxy_model(), tokenizer)
    result = answer(kad, "hello", rule="knapsack", param=0.5)
    spans = result.source_spans(0, tokenizer)
    assert "".join(text for text, _ in spans) == tokenizer.decode(result.tokens[0])
    assert [flag for _, flag in spans] == result.deferred[0]


# ---- vocabularies and loading ------------------------------------------------------------------


def test_padding_ids_are_never_drawn() -> None:
    tokenizer = make_tokenizer()  # five ids fewer than the models' logits
    tokens = len(tokenizer)
    wide = make_model(seed=3, vocabulary=VOCABULARY + 20)
    kad = KnapsackDeferral(wide, proxy_model(), tokenizer, rule="knapsack", param=0.5)
    assert kad.vocabulary.size == tokens
    result = answer(kad, ["hello"] * 8, max_new_tokens=30)
    drawn = {token for row in result.tokens for token in row}
    assert max(drawn) < tokens
    gaps = {token: i + 10 for token, i in tokenizer.get_vocab().items()}
    gappy = make_tokenizer(gaps)
    kad = KnapsackDeferral(wide, wide, gappy, rule="knapsack", param=0.5)
    assert kad.vocabulary.masked == tuple(range(10))
    drawn = {t for row in answer(kad, ["hello"] * 8, max_new_tokens=30).tokens for t in row}
    assert min(drawn) >= 10


def test_vocabularies_that_differ_are_refused() -> None:
    ours = make_tokenizer()
    swapped = dict(ours.get_vocab())
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    first = min(swapped["a"], swapped["b"])
    with pytest.raises(ValueError, match=f"first at id {first}: base has 'a', proxy has 'b'"):
        KnapsackDeferral(base_model(), proxy_model(), ours, proxy_tokenizer=make_tokenizer(swapped))
    more = ours.get_vocab() | {"<tool>": len(ours)}
    with pytest.raises(ValueError, match="base has no token, proxy has '<tool>'"):
        align_vocabularies(200, 200, ours, make_tokenizer(more))
    with pytest.raises(ValueError, match="without a tokenizer padding cannot be told"):
        align_vocabularies(100, 104)
    with pytest.raises(ValueError, match="proxy has 50 logits but the vocabulary has"):
        align_vocabularies(200, 50, ours)
    assert align_vocabularies(200, 150, ours, make_tokenizer()).size == len(ours)


def test_only_safetensors_are_loaded(tmp_path: Any) -> None:
    model = base_model()
    model.save_pretrained(tmp_path / "good")
    torch.testing.assert_close(
        load_model(str(tmp_path / "good")).lm_head.weight, model.lm_head.weight
    )
    make_tokenizer().save_pretrained(tmp_path / "good")
    kad = KnapsackDeferral.from_pretrained(
        str(tmp_path / "good"), str(tmp_path / "good"), rule="knapsack", param=0.5
    )
    assert len(kad.generate("hi", max_new_tokens=2).tokens[0]) <= 2
    bad = tmp_path / "bad"
    bad.mkdir()
    model.config.save_pretrained(bad)
    torch.save(model.state_dict(), bad / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        load_model(str(bad))
    with pytest.raises(ValueError, match=r"there is no file .*x\.gguf"):
        load_model(str(tmp_path / "x.gguf"))


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
    with pytest.raises(TypeError, match=r"input_ids is a torch\.float32 tensor"):
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

"""Around the loop: processors, stopping, streams, conversations, padding, vocabularies, files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    EOS,
    NEW,
    VOCABULARY,
    answer,
    base_model,
    make_model,
    make_tokenizer,
    proxy_model,
    ragged_prompts,
)

from tta_ext.decoding import KnapsackDeferral, align_vocabularies
from tta_ext.decoding.runtime.processors import SequenceView
from tta_ext.decoding.runtime.prompts import encode_prompts, unpad

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
    view.keep([1, 2])
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


@pytest.mark.parametrize("strict", ["base", "proxy"])
def test_a_template_that_refuses_a_role_says_whose_it_is(strict: str) -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    templates = {"base": TEMPLATE, "proxy": TEMPLATE} | {strict: refusing + TEMPLATE}
    own, theirs = (make_tokenizer(template=templates[name]) for name in ("base", "proxy"))
    kad = KnapsackDeferral(base_model(), proxy_model(), own, proxy_tokenizer=theirs)
    said = f"^prompt 0 is refused by the chat template for the {strict}: no system role$"
    with pytest.raises(ValueError, match=said):
        kad.chat(system="be brief", max_new_tokens=2, seed=0).send("hi")
    talks = [[{"role": role, "content": "hi"}] for role in ("user", "system")]
    with pytest.raises(ValueError, match=said.replace("prompt 0", "prompt 1")):
        kad.generate(talks, max_new_tokens=2, seed=0)


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

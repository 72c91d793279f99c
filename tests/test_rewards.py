"""Rewards: verifiable, sentiment, classifiers; their names on the command line."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from models import PAD, make_tokenizer

from tta_ext.decoding import rewards


def test_verifiable_rewards() -> None:
    texts = ["Silly Sam's song", "", "a s", "Über-süß 12 so"]
    assert rewards.LetterReward("S")([""] * 4, texts) == [1.0, 0.0, 0.5, 0.5]
    json_texts = ['{"a": [1]}', 'so: {"a": 1}', "{a", "7", "[" * 100000]
    assert rewards.JsonReward()([""] * 5, json_texts) == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert rewards.LengthReward(4)([""] * 3, ["one two", "a b c d", ""]) == [-0.5, 0.0, -1.0]
    both = rewards.WeightedReward([(2.0, rewards.LetterReward("s")), (1.0, rewards.JsonReward())])
    assert both([""], ["so"]) == [2.0]


def test_sentiment() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad = rewards.parse_reward("sentiment")(["", ""], ["I love it!", "I hate it."])
    assert bad < 0 < good
    assert rewards.parse_reward("sentiment:negative")([""], ["I hate it."]) == [-bad]


def test_parse_reward() -> None:
    assert isinstance(rewards.parse_reward("letter:x"), rewards.LetterReward)
    texts = ["She sells sea shells, she said", "so so so so", "none", ""]
    assert rewards.parse_reward("letter:s")(texts, texts) == [1.0, 1.0, 0.0, 0.0]
    assert rewards.parse_reward("letter:s:distinct")(texts, texts) == [5.0, 1.0, 0.0, 0.0]
    assert rewards.parse_reward("words:7").target == 7  # type: ignore[attr-defined]
    assert rewards.parse_reward("python:math:fsum") is math.fsum
    for text in (
        "nothing",
        "python:math",
        "python:math:nothing",
        "letter:ab",
        "letter:s:x",
        "words:0",
    ):
        with pytest.raises(ValueError):
            rewards.parse_reward(text)


def test_call_reward_takes_tensors_and_refuses_junk() -> None:
    assert rewards.call_reward(lambda p, r: torch.tensor([[1.0], [2.0]]), "ab", "ab") == [1.0, 2.0]
    with pytest.raises(TypeError, match="returned NoneType, expected a number"):
        rewards.call_reward(lambda p, r: None, "a", "b")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("kind", ["LlamaConfig", "BertConfig"])
def test_classifier_reward(kind: str) -> None:
    config = getattr(transformers, kind)(
        vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, num_labels=3, pad_token_id=PAD,
        id2label={0: "bad", 1: "fine", 2: "good"},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    reward = rewards.ClassifierReward(model, tokenizer, label="good", batch_size=2)
    assert tokenizer.decode(reward.encode("hi", "yes")) == "u:hi\na:yes\n"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert tokenizer.decode(reward.encode(chat, "yes")) == "s:s\nu:hi\na:yes\n"
    assert len(reward.encode("x" * 100, "yes")) == 64
    prompts, responses = ["a", "bb", "c"], ["short", "a longer answer", ""]
    together = reward(prompts, responses)
    for i in range(3):
        ids = torch.tensor([reward.encode(prompts[i], responses[i])])
        with torch.inference_mode():
            alone = model.eval()(input_ids=ids).logits[0]
        assert together[i] == pytest.approx(float(alone[2]), abs=1e-5)
    sure = rewards.ClassifierReward(model, tokenizer, label=2, probability=True)(prompts, responses)
    assert all(value < 0 for value in sure)
    plain = rewards.ClassifierReward(model, make_tokenizer(), label=0)
    assert len(plain(prompts, responses)) == 3
    with pytest.raises(ValueError, match="3 outputs; choose one: bad, fine, good"):
        rewards.ClassifierReward(model, tokenizer)
    with pytest.raises(ValueError, match="label is 'great', expected one of bad, fine, good"):
        rewards.ClassifierReward(model, tokenizer, label="great")

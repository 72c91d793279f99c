"""Rewards: verifiable, sentiment, classifiers; their names on the command line."""

from __future__ import annotations

import inspect
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import PAD, base_model, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN, rewards
from tta_ext.decoding.search.outcome import spread


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


@pytest.mark.parametrize(
    "name",
    ["sentiment:neg", "sentiment:Negative", "json:x", "words:ten", "words:-3", "classifier:",
     "python:no_such_module:f", "python::f", "python:..:f"],
)  # fmt: skip
def test_names_that_are_nearly_right_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r", expected |there is no module"):
        rewards.parse_reward(name)


def test_a_reward_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brevity.py").write_text(
        "def short(prompts, responses):\n    return [-len(r) for r in responses]\n"
        "def fails(prompts, responses):\n    return responses + 1\n"
    )
    (tmp_path / "lacks.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.parse_reward("python:brevity:short")([""], ["abc"]) == [-3]
    with pytest.raises(TypeError) as caught:
        rewards.call_reward(rewards.parse_reward("python:brevity:fails"), [""], ["a"])
    assert caught.traceback[-1].path == tmp_path / "brevity.py"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        rewards.parse_reward("python:lacks:f")


@pytest.mark.parametrize(
    "given",
    [
        [1, 2.0], (1, 2), np.array([1.0, 2.0]), np.array([[1], [2]]), torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0], [2.0]]), [torch.tensor(1.0), np.float32(2)], (x for x in (1, 2)),
        torch.tensor([1.0, 2.0], requires_grad=True), [Fraction(1), True + 1],
    ],
)  # fmt: skip
def test_what_a_reward_may_return(given: Any) -> None:
    assert rewards.call_reward(lambda p, r: given, "ab", "ab") == [1.0, 2.0]


@pytest.mark.parametrize(
    "given",
    [
        None, 3.0, {"a": 1.0, "b": 2.0}, {1.0, 2.0}, "12", b"12", ["1", "2"], [None, 1.0],
        [[1.0, 2.0], [3.0, 4.0]], torch.ones(1, 2), np.ones((1, 2)), torch.ones(2, device="meta"),
        [1j, 2j], [1.0, b"2"], np.array([1j, 2j]), bytearray(b"12"), memoryview(b"12"),
        torch.tensor(3.0), np.float64(3), torch.tensor([1.0, 2.0]).to_sparse(),
    ],
)  # fmt: skip
def test_what_a_reward_may_not_return(given: Any) -> None:
    with pytest.raises(TypeError, match="the reward returned"):
        rewards.call_reward(lambda p, r: given, "ab", "ab")


def test_values_of_rewards() -> None:
    largest = sys.float_info.max
    for given, expected in (
        ([1e300, -1e300], [1e300, -1e300]),
        ([10**400, -(10**400)], [largest, -largest]),
        ([-math.inf, 0.0], [-math.inf, 0.0]),
    ):
        found = rewards.call_reward(lambda p, r, given=given: given, "ab", "ab")
        assert found == expected
        best, deviation = spread(found)[1:]
        assert best == max(expected)
        assert not deviation < 0
    assert spread([1e300, 3e300]) == pytest.approx((2e300, 3e300, 1e300))
    for given in ([math.nan, 0.0], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="expected a finite number or -inf"):
            rewards.call_reward(lambda p, r, given=given: given, "ab", "ab")
    with pytest.raises(ValueError, match="returned 1 values for 2"):
        rewards.call_reward(lambda p, r: [1.0], "ab", "ab")


@pytest.mark.parametrize("method", [BestOfN, AdaptiveImportanceSampling])
def test_searches_with_rewards_of_any_size_that_differentiate(method: Any) -> None:
    """-max for what is ruled out; a gradient inside of the reward."""

    def reward(prompts: list[Any], answers: list[Any]) -> list[float]:
        weight = torch.ones(3, requires_grad=True)
        (weight * weight).sum().backward()
        assert weight.grad is not None
        return [-sys.float_info.max if i == 1 else float(weight.grad[0]) for i in
                range(len(answers))]  # fmt: skip

    more = {} if method is BestOfN else {"iterations": 2}
    found = method(base_model(), reward, n=4, max_new_tokens=3, **more).generate([[5, 6]], seed=0)
    assert found.best[0].reward == 2.0
    assert all(math.isfinite(one.std) for one in found.curves[0])


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


# ---- scores as the model alone gives them ----------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_labels": 1,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {"max_position_embeddings": 24, "pad_token_id": 1}),
    "roberta": ("RobertaConfig", {"max_position_embeddings": 26, "pad_token_id": 1}),
    "deberta": (
        "DebertaV2Config",
        {"max_position_embeddings": 24, "pad_token_id": 1, "relative_attention": True,
         "position_biased_input": False, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    ),
    "llama": ("LlamaConfig", {"max_position_embeddings": 24, "pad_token_id": None}),
    "llama-pad": ("LlamaConfig", {"max_position_embeddings": 24, "pad_token_id": 1}),
    "qwen": ("Qwen2Config", {"max_position_embeddings": 24, "num_key_value_heads": 2,
                             "pad_token_id": None}),
    "gpt2": ("GPT2Config", {"n_positions": 24, "n_embd": 32, "n_head": 4, "n_layer": 2,
                            "pad_token_id": None}),
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} <end>{% if not loop.last %} {% endif %}{% endfor %}"
)


def classifier(kind: str) -> Any:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    sizes = SIZES | options
    if kind == "gpt2":
        sizes = {
            k: v for k, v in sizes.items() if k in options or k in ("vocab_size", "num_labels")
        }
    if kind == "bert":
        sizes["type_vocab_size"] = 2
    config = getattr(transformers, name)(**sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def words(pad: str = "[PAD]") -> Any:
    """A tokenizer of words that marks borders and segments as BERT's does."""
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *"abcdefgh"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def alone(model: Any, inputs: dict[str, list[int]]) -> float:
    """What the model gives one input, in a batch of its own."""
    names = {"input_ids", "attention_mask", "token_type_ids"}
    accepted = names & set(inspect.signature(model.forward).parameters)
    with torch.inference_mode():
        return model(**{k: torch.tensor([inputs[k]]) for k in accepted}).logits[0, 0].item()


PAIRS = [("a b c", "c b"), ("a", "h g f e d c"), ("d d d d", ""), ("b a", "a")]


@pytest.mark.parametrize("pad", ["[PAD]", "<end>"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_alone(kind: str, pad: str) -> None:
    """Pairs, answers alone and conversations; padding may be what ends a turn."""
    model, tokenizer = classifier(kind), words(pad)
    before = model.config.pad_token_id
    prompts, answers = (list(each) for each in zip(*PAIRS, strict=True))
    pair = rewards.ClassifierReward(model, tokenizer)(prompts, answers)
    single = rewards.ClassifierReward(model, tokenizer, single=True)(prompts, answers)
    chat = rewards.ClassifierReward(model, tokenizer, template=TEMPLATE)(prompts, answers)
    for i, (prompt, answer) in enumerate(PAIRS):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        turn_inputs = tokenizer.apply_chat_template(
            turns, chat_template=TEMPLATE, tokenize=True, return_dict=True
        )
        for found, inputs in (
            (pair, tokenizer(prompt, answer)), (single, tokenizer(answer)), (chat, turn_inputs),
        ):  # fmt: skip
            assert found[i] == pytest.approx(alone(model, inputs), abs=2e-5)
    assert len({round(value, 3) for value in pair}) == len(PAIRS)
    assert model.config.pad_token_id == before


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_beyond_the_positions_lose_their_beginning(kind: str) -> None:
    """Borders stay; RoBERTa has fewer positions than rows, DeBERTa as many as one likes."""
    model, tokenizer = classifier(kind), words()
    room = {"deberta": None}.get(kind, 24)
    reward = rewards.ClassifierReward(model, tokenizer)
    assert reward.max_length == room
    prompt, answer = " ".join("abcdefgh" * 5), "a b c"
    found = reward.features(prompt, answer)["input_ids"]
    whole = tokenizer(prompt, answer)["input_ids"]
    if room is None:
        assert found == whole
    else:
        assert found == [whole[0], *whole[len(whole) - room + 1 :]]
        long = reward.features("a", prompt)["input_ids"]
        assert len(long) == room
        assert (long[0], long[-1]) == (0, 2)
    (value,) = reward([prompt], [answer])
    inputs = tokenizer(prompt, answer)
    if room is not None:
        cut = len(whole) - room
        inputs = {name: [row[0], *row[cut + 1 :]] for name, row in inputs.items()}
    assert value == pytest.approx(alone(model, inputs), abs=2e-5)
    tokenizer.model_max_length = 12
    assert rewards.ClassifierReward(model, tokenizer).max_length == 12


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_of_ids_are_no_text(template: str | None) -> None:
    reward = rewards.ClassifierReward(classifier("llama"), words(), template=template)
    with pytest.raises(ValueError, match="the prompt is token ids, and this reward reads text"):
        reward([[5, 6]], ["a"])
    refusing = "{{ raise_exception('no such role') }}"
    said = "an answer is refused by the chat template for the reward model: no such role"
    with pytest.raises(ValueError, match=said):
        rewards.ClassifierReward(classifier("llama"), words(), template=refusing)(["a"], ["b"])


# ---- measures ----------------------------------------------------------------------------------


def test_diversity_is_the_share_of_different_n_grams() -> None:
    diversity = rewards.parse_reward("diversity")
    texts = ["a b a b a b", "one two Three four", "so so", "", "no No NO no"]
    # Of 5, 4 and 3 n-grams 2 each are different; of "no no no no" 1 of 3, of 2 and of 1.
    expected = [2 / 5 * 2 / 4 * 2 / 3, 1.0, 1.0, 1.0, 1 / 3 * 1 / 2]
    assert diversity([""] * 5, texts) == pytest.approx(expected)
    with pytest.raises(ValueError, match="after the reward's colon is '3'"):
        rewards.parse_reward("diversity:3")


def test_closeness_is_the_cosine_of_mean_hidden_states(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    model.save_pretrained(tmp_path)  # without a pooler, which the mean does not need
    make_tokenizer().save_pretrained(tmp_path)
    reward = rewards.parse_reward(f"embedding:{tmp_path}")
    assert isinstance(reward, rewards.EmbeddingReward)
    prompts: list[Any] = ["abc", [{"role": "user", "content": "hello you"}], "z"]
    answers = ["hi", "a longer answer than that", ""]

    def mean(text: str) -> torch.Tensor:
        ids = torch.tensor([make_tokenizer()(text)["input_ids"][:16]])
        with torch.inference_mode():
            return model.eval()(input_ids=ids).last_hidden_state[0].mean(0)

    for place, prompt in enumerate(("abc", "hello you")):
        cosine = torch.cosine_similarity(mean(prompt), mean(answers[place]), dim=0)
        assert reward(prompts, answers)[place] == pytest.approx(float(cosine), abs=1e-5)
    assert reward(prompts, answers)[2] == 0.0  # no token, no direction
    assert reward(["same"], ["same"]) == pytest.approx([1.0])
    near = rewards.parse_reward(f"embedding:{tmp_path}#hello you")
    assert near([""], ["abc"]) == pytest.approx(reward(["abc"], ["hello you"]), abs=1e-5)
    with pytest.raises(ValueError, match="names no model"):
        rewards.parse_reward("embedding:")
    with pytest.raises(ValueError, match="wanted is empty"):
        rewards.parse_reward(f"embedding:{tmp_path}#")

"""The value function, and the searches that use it: RE-Control and controlled decoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from models import base_model, make_tokenizer
from searches import PROMPTS, tokens_of
from torch import Tensor

from tta_ext import demo_pair
from tta_ext.decoding import (
    BestOfN,
    ReControlSearch,
    RewardGuidedSearch,
    ValueHead,
    load_value,
    train_value,
)
from tta_ext.decoding.search.compare import Contestant, compare, resolved, summary
from tta_ext.decoding.search.settings import settings_facts
from tta_ext.demo.task import evaluation_problems

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": []}


def leaning(prompts: list[Any], responses: list[str]) -> list[float]:
    """Mean of a number of each character that the model's own vectors know."""
    scores = base_model().get_input_embeddings().weight[:, 0].tolist()
    ids = [make_tokenizer()(text)["input_ids"] for text in responses]
    return [sum(scores[i] for i in row) / max(len(row), 1) for row in ids]


# Short answers: their first token is half of the reward, and the head's inputs know it.
TRAINING: dict[str, Any] = {
    **OPTIONS, "max_new_tokens": 2, "n": 48, "seed": 1
}  # fmt: skip
MORE = [text + end for text in PROMPTS for end in (" a", " be", " see", "?", " no", " why")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The order of a model's sums is the number of threads' affair."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ValueHead, str]:
    head = train_value(base_model(), leaning, MORE, make_tokenizer(), **TRAINING)
    path = tmp_path_factory.mktemp("value") / "value.safetensors"
    head.save(path)
    return head, str(path)


def random_head(dimensions: int = 12) -> ValueHead:
    head = ValueHead(dimensions, 7, seed=3)
    head.centre = torch.randn(dimensions, generator=torch.Generator().manual_seed(4))
    head.scale, head.mean, head.deviation = map(torch.tensor, (1.7, -2.0, 3.0))
    return head.requires_grad_(False)


def test_slope_is_that_of_finite_differences() -> None:
    head = random_head().double()
    head._inside = lambda h: torch.tanh(head.inner((h - head.centre) / head.scale))  # type: ignore
    h = torch.randn(5, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope, step = head.gradient(h), 1e-6
    for i in range(12):
        ahead, behind = h.clone(), h.clone()
        ahead[:, i] += step
        behind[:, i] -= step
        torch.testing.assert_close(
            (head(ahead) - head(behind)) / (2 * step), slope[:, i], rtol=1e-6, atol=1e-8
        )


def test_ascent_follows_the_slope_and_raises_the_value() -> None:
    head = random_head()
    h = torch.randn(5, 12, generator=torch.Generator().manual_seed(6))
    one = head.ascend(h, 1, 0.1)
    unit = 0.1 * head.scale.square() / head.deviation
    torch.testing.assert_close(one, h + unit * head.gradient(h))
    assert bool((head(head.ascend(h, 5, 0.1)) > head(one)).all())
    assert head.ascend(h, 0, 0.1) is h
    assert head.ascend(h, 3, 0.0) is h
    assert head.ascend(h.bfloat16(), 3, 0.1).dtype == torch.bfloat16


def test_training_beats_the_mean_on_unseen_prompts() -> None:
    """The shipped base, whose numbers say how long its answer will be."""
    pair = demo_pair()
    prompts = [problem.prompt for problem in evaluation_problems(40)]
    head = train_value(
        pair.base, lambda p, r: [float(len(text)) for text in r], prompts, pair.tokenizer, n=6,
        max_new_tokens=12,
    )  # fmt: skip
    assert head.facts["held_out_error"] < 0.95 * head.facts["held_out_variance"]
    assert head.facts["samples"] == head.samples == 6 * len(prompts)
    assert 0 < head.facts["tokens"] <= 12 * 6 * len(prompts)


def test_training_again_gives_the_same_and_is_put_away(trained: tuple[ValueHead, str]) -> None:
    head, path = trained
    again = train_value(base_model(), leaning, MORE, make_tokenizer(), **TRAINING)
    loaded = load_value(path)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name])
        assert torch.equal(value, loaded.state_dict()[name])
    assert loaded.facts == head.facts


def test_what_training_and_loading_refuse(trained: tuple[ValueHead, str], tmp_path: Path) -> None:
    model, tokenizer = base_model(), make_tokenizer()
    with pytest.raises(ValueError, match="there are 1 prompts, expected at least 2"):
        train_value(model, leaning, ["a"], tokenizer)
    with pytest.raises(ValueError, match="rewards are all 1"):
        train_value(model, lambda p, r: [1.0] * len(r), PROMPTS, tokenizer, n=2, **OPTIONS)
    (tmp_path / "no").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no value function"):
        load_value(tmp_path / "no")
    with pytest.raises(ValueError, match=r"for pre-logits of .* numbers, this model's have 5"):
        load_value(trained[1], 5)
    with pytest.raises(ValueError, match="needs value=FILE"):
        ReControlSearch(model, leaning, tokenizer)


@pytest.mark.parametrize("still", [{"steps": 0}, {"step_size": 0.0}], ids=str)
def test_no_steps_are_plain_sampling(trained: tuple[ValueHead, str], still: dict[str, Any]) -> None:
    model, tokenizer = base_model(), make_tokenizer()
    plain = BestOfN(model, leaning, tokenizer, n=4, **OPTIONS).generate(PROMPTS, seed=2)
    control = ReControlSearch(
        model, leaning, tokenizer, value=trained[1], n=4, **OPTIONS, **still
    ).generate(PROMPTS, seed=2)
    assert tokens_of(plain) == tokens_of(control)
    assert plain.rewards == control.rewards


def test_steps_raise_the_reward_and_are_metered(trained: tuple[ValueHead, str]) -> None:
    model, tokenizer = base_model(), make_tokenizer()
    means, kl = [], []
    for size in (0.0, 3.0):
        found = ReControlSearch(
            model, leaning, tokenizer, value=trained[1], n=32, steps=3, step_size=size, **OPTIONS
        ).generate(PROMPTS, seed=2)
        assert found.training == 48 * len(MORE)
        assert found.samples == [32] * len(PROMPTS)
        means.append(sum(curve[0].mean for curve in found.curves) / len(PROMPTS))
        kl.append([curve[0].kl for curve in found.curves])
    assert means[1] > means[0] + 0.02
    assert kl[0] == [None] * len(PROMPTS)
    assert all(value is not None and value > 0.0 for value in kl[1])


@torch.inference_mode()
def definition(model: Any, head: ValueHead, prompt: list[int], weight: float, k: int) -> list[int]:
    """Controlled decoding by whole forwards: greedy over log p + weight V after each candidate."""

    def hidden(ids: list[int]) -> Tensor:
        body = model.model if hasattr(model, "model") else model.transformer
        found: Tensor = body(input_ids=torch.tensor([ids]), use_cache=False)[0][0, -1]
        return found

    answer: list[int] = []
    for _ in range(OPTIONS["max_new_tokens"]):
        ids = prompt + answer
        log_p = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        values, tokens = log_p.sort(descending=True, stable=True)
        scores = [
            float(value) + weight * float(head(hidden([*ids, int(token)])))
            for value, token in zip(values[:k], tokens[:k], strict=True)
        ]
        answer.append(int(tokens[scores.index(max(scores))]))
    return answer


def test_controlled_decoding_is_its_definition(trained: tuple[ValueHead, str]) -> None:
    model, tokenizer = base_model(), make_tokenizer()
    asked: list[str] = []

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        asked.extend(responses)
        return leaning(prompts, responses)

    settings: dict[str, Any] = {"candidates": 4, "weight": 8.0, "value": trained[1], **OPTIONS}
    found = RewardGuidedSearch(model, reward, tokenizer, **settings).generate(PROMPTS, seed=0)
    for text, best in zip(PROMPTS, found.best, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert best.tokens == definition(model, trained[0], ids, 8.0, 4)
    assert len(asked) == len(PROMPTS)  # the finished answers
    assert found.training == trained[0].samples
    plain = RewardGuidedSearch(
        model, reward, tokenizer, **{**settings, "value": None, "weight": 0.0}
    ).generate(PROMPTS, seed=0)
    assert plain.training == 0
    assert tokens_of(plain) != tokens_of(found)


def test_comparison_counts_the_training(trained: tuple[ValueHead, str]) -> None:
    contestants = [
        Contestant.parse("best_of_n"),
        Contestant.parse(f"re=re_control:value={trained[1]}"),
    ]
    records = compare(
        base_model(), make_tokenizer(), leaning, PROMPTS, contestants, samples=3, common=OPTIONS
    )
    rows = {row["label"]: row for row in summary(records)}
    assert rows["best_of_n"]["training"] == 0
    assert rows["re"]["training"] == trained[0].samples
    assert rows["re"]["asked"] == rows["best_of_n"]["asked"] == 3


def test_a_resume_key_has_what_is_in_the_file(tmp_path: Path) -> None:
    """And of settings that name no file what it always had."""
    path, found = tmp_path / "value.safetensors", []
    one = Contestant.parse(f"re_control:value={path}")
    for seed in (0, 1):
        ValueHead(5, 3, seed).save(path)
        ((_, settings),) = resolved([one], None, 2, None).values()
        found.append(settings_facts(settings))
    assert found[0]["settings"] == found[1]["settings"]
    assert found[0]["value"] != found[1]["value"]
    ((_, settings),) = resolved([Contestant.parse("best_of_n")], None, 2, None).values()
    assert list(settings_facts(settings)) == ["settings"]


def test_the_command_replaces_value_functions_alone(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "value.safetensors"
    path.write_bytes(b"of someone else")
    nowhere = str(tmp_path / "nowhere")  # a name would be looked for on the hub, for a minute
    words = ["value", "--reward", "letter:s", "--model", nowhere, "--output", str(path), "a", "b"]
    assert "it is kept" in call(capsys, *words)[2]
    assert path.read_bytes() == b"of someone else"
    random_head().save(path)  # whole or not at all: nothing else is left
    assert "it is kept" not in call(capsys, *words)[2]  # what is missing now is the model
    load_value(path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]

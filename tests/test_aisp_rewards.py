"""The sceptic's comparison of searches: shared draws, a run cut short, what the table says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import PAD, base_model, make_tokenizer

from benchmarks import aisp_rewards, aisp_table, preference
from tta_ext.decoding import BestOfN
from tta_ext.decoding.rewards import EmbeddingReward, LetterReward
from tta_ext.decoding.runtime.loading import load_model
from tta_ext.journal import Journal

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
METHODS = ["best_of_n", "soft", "aisp", "aisp_fisher", "re_control", "chunk_beam", "args"]


def encoder() -> EmbeddingReward:
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    return EmbeddingReward(transformers.AutoModel.from_config(config), make_tokenizer())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: Any) -> Callable[..., aisp_rewards.Bench]:
    base_model().save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))

    monkeypatch.setattr(aisp_rewards, "PARTS", 2)
    asked = aisp_rewards.EVALUATION

    def made(*words: str, prompts: int = 4) -> aisp_rewards.Bench:
        monkeypatch.setattr(aisp_rewards, "EVALUATION", asked[:prompts])
        work = ["--work", str(tmp_path), "--length", "3"]
        args = aisp_rewards.parser().parse_args([*words, *work])
        journal = Journal(tmp_path / "journal.jsonl")
        loaded = model, make_tokenizer(template=TEMPLATE), encoder()
        return aisp_rewards.Bench(args, journal, loaded)

    return made


def lines_of(bench: aisp_rewards.Bench) -> list[tuple[Any, ...]]:
    return sorted(
        (r["run"]["tag"]["reward"], r["label"], r["index"], r["reward"], r["text"])
        for _, rows in bench.finished()
        for r in rows
    )


def test_a_run_cut_short_goes_on(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    words = ["--samples", "16", "--reward", "letter:a", "style", "--method"]
    whole = bench(*words, *METHODS)
    whole.run()
    expected = lines_of(whole)
    assert len(expected) == 2 * len(METHODS) * 4
    journal = tmp_path / "journal.jsonl"
    kept = journal.read_text().splitlines(keepends=True)
    for count in (0, 5, 11):
        journal.write_text("".join(kept[:count]))
        again = bench(*words, *METHODS)
        again.run()
        assert lines_of(again) == expected
        assert journal.read_text().startswith("".join(kept[:count]))
    with monkeypatch.context() as patch:  # nothing is drawn or trained again
        patch.setattr("tta_ext.decoding.search.base.SearchMethod.generate", pytest.fail)
        done = bench(*words, *METHODS)
        done.run()
        assert lines_of(done) == expected
    # Of a label with new settings the old answers leave the table.
    changed = bench(*words, "aisp=aisp:n=8")
    changed.run()
    rows = [r for _, rows in changed.finished() for r in rows if r["label"] == "aisp"]
    assert len(rows) == 8
    assert all(r["run"]["settings"]["n"] == 8 for r in rows)


def test_answers_drawn_once_are_those_of_best_of_n(bench: Any) -> None:
    words = "--samples", "20", "--reward", "letter:a", "--method", "best_of_n", "soft"
    small = bench(*words, prompts=3)
    small.run()
    (cell, rows), = small.finished()  # fmt: skip
    assert cell == ("letter:a", 3, 20, None)
    for label in ("best_of_n", "soft"):
        mine = sorted((r for r in rows if r["label"] == label), key=lambda r: r["index"])
        own = BestOfN(
            small.model, LetterReward("a"), small.tokenizer, n=20, group=16, max_new_tokens=3,
            soft=mine[0]["run"]["settings"]["soft"],
        ).generate(small.prompts, seed=0)  # fmt: skip
        assert [r["text"] for r in mine] == own.texts
        assert [r["reward"] for r in mine] == [one.reward for one in own.best]
        for record, curve in zip(mine, own.curves, strict=True):
            for name in ("mean", "best", "std", "tokens", "samples"):
                assert [p[name] for p in record["curve"]] == [getattr(p, name) for p in curve]
    assert mine[0]["run"]["settings"]["soft"] > 0


def test_table_and_picture(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = "--samples", "16", "--seconds", "0.001", "--reward", "letter:a", "--method"
    small = bench(*words, "best_of_n", "aisp", prompts=2)
    small.run()
    cells = aisp_table.merged((), small.finished())
    order = list(aisp_rewards.METHODS)
    text = aisp_table.document(cells, "best_of_n", order)
    rows = [[c.strip() for c in line.split("|")][1:-1] for line in text.splitlines()]
    found = [row for row in rows if row[2:3] == ["aisp"]]
    assert [row[:2] for row in found] == [["3", "16 samples"], ["3", "0.001 s"]]
    # A budget of seconds takes at least one round: here the other budget's 16 answers.
    assert [row[12] for row in found] == ["16", "16"]
    assert [sum(map(int, row[6].split("/"))) for row in found] == [2, 2]
    by = {r["label"]: r for r in cells[0][1] if r["index"] == 0}
    assert by["aisp"]["metrics"].keys() == {"surprise", "diversity", "coherence"}
    aisp_table.draw(cells, tmp_path / "plot.svg", "best_of_n", order)
    assert (tmp_path / "plot.svg").stat().st_size > 5000


def test_answers_of_two_machines_make_one_table(bench: Any, tmp_path: Path) -> None:
    words = "--samples", "16", "--reward", "letter:a", "--method", "best_of_n", "aisp"
    whole = bench(*words)
    whole.run()
    cells = aisp_table.merged((), whole.finished())
    order = list(aisp_rewards.METHODS)
    halves = [
        [(cell, [r for r in rows if r["index"] % 2 == part]) for cell, rows in cells]
        for part in (0, 1)
    ]
    prompts = [prompt[-1]["content"] for prompt in whole.prompts]
    kept = list(aisp_table.from_csv(aisp_table.as_csv(halves[0]), prompts))
    assert aisp_table.document(aisp_table.merged(kept, halves[1]), "best_of_n", order) == (
        aisp_table.document(cells, "best_of_n", order)
    )
    text = aisp_table.as_csv(cells)
    assert aisp_table.MARK.match(text.encode())
    again = aisp_table.from_csv(text, prompts)
    assert aisp_table.as_csv(aisp_table.merged(again, cells)) == text


def test_surprise_is_the_models_own_log_probability(bench: Any) -> None:
    small = bench()
    metric = aisp_rewards.Surprise(small.model, small.tokenizer)
    prompt = [{"role": "user", "content": "hi"}]
    asked, said = (small.tokenizer(text)["input_ids"] for text in ("hi\n", "yes"))
    with torch.inference_mode():
        log_p = small.model(torch.tensor([asked + said])).logits[0].double().log_softmax(-1)
    expected = [-float(log_p[len(asked) - 1 + i, token]) for i, token in enumerate(said)]
    assert metric([prompt, prompt], ["yes", ""]) == pytest.approx([sum(expected) / 3, 0.0])


def test_preferences_are_learnt(tmp_path: Path) -> None:
    topic = "Tell me about bread."
    assert preference.merit(topic, "Bread is good. It is bread.") == pytest.approx(1.0 + 1.0 + 0.5)
    assert preference.merit(topic, "no no no no") == pytest.approx((1 / 3) * (1 / 2))
    assert preference.preferences(topic, ["no no", "Bread.", "Breads."]) == [
        ("Bread.", "no no"), ("Breads.", "no no")
    ]  # fmt: skip
    answers = [["bread is here.", "a bread.", "no", "zz zz zz zz zz"]] * 4
    head = preference.train(encoder(), [topic] * 4, answers, held_out=1, epochs=60)
    assert head.facts["held_out_pairs"] * 3 == head.facts["pairs"]
    assert head.facts["held_out_accuracy"] > 0.9  # the same pairs
    assert preference.described(head.facts | {"length": 3})

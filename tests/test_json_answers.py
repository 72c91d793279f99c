"""Facts in JSON: the split, the scorer, and a run cut short."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer

from benchmarks import json_answers, json_facts, json_proxy
from benchmarks.acceptance import without_layers
from tta_ext.decoding.runtime.loading import load_model
from tta_ext.evaluation import GREEDY, SAMPLED, Models
from tta_ext.journal import Journal

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FACT = json_facts.Fact("city", "What is the capital of Ukraine?", ("Kyiv", "Kiev"))


def test_no_question_is_in_two_parts() -> None:
    parts = json_facts.split()
    questions = [fact.question for part in parts for fact in part]
    assert sorted(questions) == sorted(fact.question for fact in json_facts.facts())
    assert len(set(questions)) == len(questions)
    assert [len(parts.tuning), len(parts.test)] == [json_facts.TUNING, json_facts.TEST]
    for part in parts:
        assert {fact.kind for fact in part} == set(json_facts.KINDS)
    assert json_facts.split(1) != parts
    assert {fact.kind for fact in json_facts.examples(parts.training)} == set(json_facts.KINDS)


def test_documents_teach_the_shape_and_no_facts() -> None:
    training = json_facts.split().training
    known = {fact.question: fact for fact in training}
    made = list(itertools.islice(json_facts.documents(training, [" lamp", "ter", "Ob"], 0), 400))
    facts = [(known[turns[-1]["content"]], answer) for turns, answer in made]
    scores = [json_facts.score(*one) for one in facts]
    assert all(one.formatted for one in scores)
    # Values are right by chance alone.
    assert sum(one.exact for one in scores) < 40
    assert made == list(
        itertools.islice(json_facts.documents(training, [" lamp", "ter", "Ob"], 0), 400)
    )


@pytest.mark.parametrize(
    ("text", "exact", "lenient", "formatted"),
    [
        ('{"kind": "city", "answer": "Kyiv"}', True, True, True),
        (' {"kind": "city",\n"answer": "kiev "}\n', True, True, True),
        ('{"kind": "city", "answer": "Lviv"}', False, False, True),
        ('{"kind": "city", "answer": "Kyiv in Ukraine"}', False, True, True),
        ('{"kind": ["city"], "answer": "Kyiv"}', False, True, False),
        ('{"answer": "Kyiv"}', False, True, False),
        ('{"kind": "city", "answer": ["Kyiv"]}', False, True, False),
        ('{"kind": "city", "answer": "Kyiv"', False, True, False),
        ("The capital is Kyiv.", False, True, False),
        ("Kyivan Rus", False, False, False),
        ('["Kyiv"]', False, True, False),
        ("", False, False, False),
    ],
)
def test_an_answer_is_in_shape_and_right(
    text: str, exact: bool, lenient: bool, formatted: bool
) -> None:
    for kind in (True, False):
        assert json_facts.score(FACT, text, kind) == (exact, lenient, formatted)


def test_the_kind_may_be_left_out_of_the_score() -> None:
    text = '{"kind": "word", "answer": "Kyiv"}'
    assert json_facts.score(FACT, text) == (False, True, False)
    assert json_facts.score(FACT, text, kind=False) == (True, True, True)


def test_the_wanted_line_is_right() -> None:
    for fact in json_facts.facts():
        assert json_facts.score(fact, fact.line) == (True, True, True)
        assert json.loads(fact.line) == {"kind": fact.kind, "answer": fact.answers[0]}


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[Any, Any]:
    model = make_model(num_hidden_layers=3, max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "model")
    return load_model(str(tmp_path / "model")), make_tokenizer(template=TEMPLATE)


def test_a_run_cut_short_goes_on(loaded: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(json_proxy, "STEPS", 2)
    monkeypatch.setattr(json_answers, "CANDIDATES", json_answers.CANDIDATES[::2])
    monkeypatch.setattr(json_facts, "MAX_NEW_TOKENS", 3)
    # The schema needs a library that is in no extra.
    free = [trial for trial in json_answers.TRIALS if not trial.grammar]
    monkeypatch.setattr(json_answers, "TRIALS", free)
    words = ["--n", "5", "--work", str(tmp_path), "--modes", GREEDY, SAMPLED, "--batch-size", "20"]
    args = json_answers.parser().parse_args(words)
    path = tmp_path / "journal.jsonl"

    def run() -> str:
        with Journal(path) as journal:
            return json_answers.Bench(args, journal, loaded).run()

    whole = run()
    assert whole.count("| KAD  ") == 2
    monkeypatch.setattr(json_proxy, "train", pytest.fail)  # the proxy is on the disk
    kept = path.read_text().splitlines(keepends=True)
    assert len(kept) == 2 * (2 * 2 + len(free))
    path.write_text("".join(kept[:3]))
    assert run() == whole
    with monkeypatch.context() as patch:
        patch.setattr(json_answers.Answering, "decode", pytest.fail)
        assert run() == whole


def test_tuning_leaves_the_embedding(loaded: Any) -> None:
    base, tokenizer = loaded
    proxy = without_layers(base, [1])
    before = {name: weight.clone() for name, weight in proxy.named_parameters()}
    data = json_proxy.batches(tokenizer, json_facts.split().training, 0, 4)
    first = json_proxy.train(proxy, data, 1)
    assert json_proxy.train(proxy, data, 30) < first
    changed = {n for n, w in proxy.named_parameters() if not w.equal(before[n])}
    assert changed == set(before) - {"model.embed_tokens.weight"} - {"lm_head.weight"}
    assert base.get_input_embeddings().weight.requires_grad


def test_the_schema_leaves_one_shape(loaded: Any) -> None:
    pytest.importorskip("xgrammar")
    base, tokenizer = loaded
    pair = Models(base, base, tokenizer)
    facts = json_facts.split().test[:2]
    schema = json_answers.Schema(tokenizer, base.config.vocab_size)
    trial = json_answers.Trial("base", json_answers.BASE, grammar=True)
    prompts = [json_facts.prompt(fact.question) for fact in facts]
    machine = json_answers.Answering(pair, prompts, prompts, trial, schema)
    for mode in (GREEDY, SAMPLED):
        options = {"seed": 0, "max_new_tokens": 60}
        for text in machine.decode((0, json_answers.BASE, mode, options), [0, 1])["texts"]:
            assert re.match(r'\{"kind": "(' + "|".join(json_facts.KINDS) + r')", "answer": "', text)

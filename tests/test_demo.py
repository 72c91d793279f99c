"""The demo: problems, scores, training text and training, the shipped pair, its evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

pytest.importorskip("transformers")

import tta_ext
from benchmarks import demo_pair
from scripts.demo_training import corpus, train
from tta_ext import evaluation
from tta_ext.cli.common import load_models
from tta_ext.demo import task
from tta_ext.demo.pair import ASSETS
from tta_ext.journal import Journal

EVALUATION_DIGEST = "dcac9e859480e4d4"
KAD = "threshold:0.4"
OTHER = evaluation.Setting("threshold", 0.9)

PROBLEM = task.Problem(
    name="Tom",
    item="apples",
    start=47,
    steps=(task.Step(47, "+", 12, 59), task.Step(59, "-", 20, 39)),
    sentences=("Tom has 47 apples.", "Tom buys 12 more.", "Tom sells 20."),
)


def test_problem_texts():
    assert PROBLEM.prompt == (
        "Q: Tom has 47 apples. Tom buys 12 more. Tom sells 20. How many apples?\nA:"
    )
    assert PROBLEM.formatted_answer() == " 47+12=59; 59-20=39; #### 39"
    assert PROBLEM.answer == 39
    assert PROBLEM.chain == "47+12-20"


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        (" 47+12=59; 59-20=39; #### 39", True, True),
        (" 47+12=59; 59-20=39; #### 39\n", True, True),
        (" #### 39", True, True),
        (" 47+12=59; 59-20=39; #### 38", False, False),
        (" 47+12=59; 59-20=39; #### 39 Cheers.", False, True),
        (" 47+12=59, so 59-20=39. Tom has 39 apples. Thanks!", False, True),
        (" 47+12=59; 59-20=39; ####39", False, True),
        (" #### 139", False, False),
        (" 39 apples, not 40.", False, False),
        (" 39\nQ: Ana has 4 books.", False, True),
        ("", False, False),
        (" no idea", False, False),
    ],
)
def test_scores(completion, strict, lenient):
    score = task.score(PROBLEM, completion)
    assert (score.exact, score.lenient) == (strict, lenient)
    assert score.formatted == (task.strict_answer(completion) is not None)


def test_problems_are_sound():
    for problem in task.evaluation_problems(300, seed=3):
        assert len(problem.steps) in task.EVALUATION_STEPS
        total = problem.start
        for step in problem.steps:
            assert step.before == total
            total = eval(f"{total}{step.op}{step.operand}")
            assert step.after == total
            assert 1 <= total <= task.TOTAL
        assert problem.answer == total
        assert str(problem.start) in problem.prompt
        assert task.score(problem, problem.formatted_answer()).exact


def test_evaluation_is_a_function_of_its_seed():
    first = task.evaluation_problems(50, seed=0)
    assert first == task.evaluation_problems(80, seed=0)[:50]
    assert first != task.evaluation_problems(50, seed=1)
    kept = task.evaluation_task(20, skip=30)
    assert list(kept.prompts) == [problem.prompt for problem in first[30:]]
    assert kept.score(0, first[30].formatted_answer()).exact
    # The generator must not change silently: figures on record belong to these problems.
    text = "\n".join(problem.prompt for problem in task.evaluation_problems(500))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == EVALUATION_DIGEST
    with pytest.raises(ValueError, match="-1"):
        task.evaluation_problems(-1)
    with pytest.raises(ValueError, match="steps"):
        task.make_problem(random.Random(0), 0)


def test_training_text_is_a_function_of_its_seed():
    for phase in corpus.PHASES:
        one = list(islice(corpus.raw_documents(5, phase), 50))
        assert one == list(islice(corpus.raw_documents(5, phase), 50))
        assert one != list(islice(corpus.raw_documents(6, phase), 50))
    assert list(islice(corpus.formatted_documents(5), 20)) == list(
        islice(corpus.formatted_documents(5), 20)
    )


def test_formatted_documents_follow_the_format():
    for text, problem in islice(corpus.formatted_documents(0), 100):
        assert text == problem.prompt + problem.formatted_answer()
        assert task.score(problem, text[len(problem.prompt) :]).exact


def test_raw_text_holds_every_step_but_questions_are_mostly_answered_at_once():
    marked = worked = asked = at_once = 0
    for text, problem in islice(corpus.raw_documents(0, "final"), 3000):
        if problem is None:
            continue
        assert str(problem.answer) in text
        steps = [equation in text for equation in problem.equations()]
        assert all(steps) or not any(steps)
        worked += all(steps)
        marked += task.ANSWER_MARK in text
        asked += text.startswith("Q:")
        at_once += text.startswith("Q:") and not any(steps)
    assert worked > 1000
    assert 0 < marked / worked < 0.05
    assert at_once / asked == pytest.approx(corpus.DIRECT_SHARE, abs=0.04)


@pytest.mark.parametrize("most", [1500, pytest.param(None, marks=pytest.mark.slow)])
def test_no_evaluation_problem_was_asked_in_training(most):
    """The documents that training read, made again from the recorded seeds and counts."""
    training = json.loads((ASSETS / "training.json").read_text())
    problems = task.evaluation_problems(1000)
    chains = {problem.chain for problem in problems}
    stories = {problem.story for problem in problems}
    assert len(chains) == len(problems)
    read = 0
    for stage in training["stages"]:
        if stage["text"] == "formatted":
            documents = corpus.formatted_documents(stage["seed"])
        else:
            documents = corpus.raw_documents(stage["seed"], stage["text"])
        count = stage["documents"] or stage["read"]
        for text, problem in islice(documents, min(count, most or count)):
            read += 1
            if problem is not None:
                assert not problem.held_out
                assert problem.chain not in chains
                assert problem.story not in stories
                assert problem.story in text or problem.sentences[0] in text
    assert read > (3 * most if most else 50_000)


# ---- the shipped pair ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return load_models(None, None, implicit=True)


def evaluate(pair, settings, n, **options):
    return list(evaluation.evaluate(pair, task.evaluation_task(n), settings, **options))


@pytest.fixture(scope="module")
def small_run(pair):
    return evaluate(pair, ["base", "proxy", KAD], 40, batch_size=40)


def test_demo_pair_is_what_the_example_says():
    kad = tta_ext.KnapsackDeferral(*tta_ext.demo_pair(), rule="threshold", param=0.4)
    assert kad.base.dtype == torch.float32
    assert kad.generate(PROBLEM.prompt, seed=0).text == PROBLEM.formatted_answer()


def test_assets_are_small_and_complete():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    tokenizers = {
        (ASSETS / name / "tokenizer.json").read_bytes() for name in ("base", "proxy", "proxy_init")
    }
    assert len(tokenizers) == 1
    assert {file.suffix for file in files} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("name", ["base", "proxy", "proxy_init"])
def test_assets_load_with_transformers(name):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / name)
    assert model.dtype == torch.float32
    # Engines choose the class by this name, before any weights.
    config = json.loads((ASSETS / name / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert model.config.vocab_size == len(tokenizer)
    text = "Q: Eva has 104 shells.\nA: 104-35=69; #### 69"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    digits = [tokenizer.decode([i]) for i in ids]
    assert all(len(t) == 1 for t in digits if any(c.isdigit() for c in t))
    assert tokenizer.eos_token_id == model.config.eos_token_id
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits
    assert logits.isfinite().all()


def test_deferral_beats_both_models(small_run):
    """A small run of the claim; benchmarks/results/demo_pair.md has it at n = 1000."""
    by = {(row.setting.label, row.mode): row for row in small_run}
    label = evaluation.Setting.parse(KAD).label
    for mode in evaluation.MODES:
        kad, base, proxy = by[label, mode], by["base", mode], by["proxy", mode]
        # Whatever the format of their answers.
        assert kad.exact >= base.lenient + 0.25
        assert kad.exact >= proxy.lenient + 0.25
        assert proxy.formatted > 0.9
        assert 0.0 < kad.deferred_rate <= kad.proxy_call_rate < 0.6
        assert base.proxy_call_rate == base.deferred_rate == 0.0
        assert proxy.proxy_call_rate == 1.0


def test_rows_do_not_depend_on_other_rows(pair):
    settings = ["base", "proxy", "confidence_bet:0.2"]
    rows = evaluate(pair, settings, 8, modes=["sampled"])
    again = evaluate(pair, settings[::-1], 8, modes=["sampled"])[::-1]
    for one, other in zip(rows, again, strict=True):
        assert timeless(one) == timeless(other)
    other_seed = evaluate(pair, ["base"], 8, modes=["sampled"], seed=1)
    assert other_seed[0].tokens != rows[0].tokens


def timeless(row):
    return {k: v for k, v in vars(row).items() if k != "tokens_per_second"}


def test_a_killed_run_resumes(pair, tmp_path, monkeypatch):
    path, settings = tmp_path / "journal.jsonl", ["proxy", "threshold:0.4"]
    options = {"batch_size": 2, "modes": ["sampled"]}
    whole = evaluate(pair, settings, 6, **options)

    class Killed(Exception):
        pass

    done = []

    def killed_after_four(count, tokens):
        done.append(count)
        if len(done) == 4:
            raise Killed

    with pytest.raises(Killed):
        evaluate(pair, settings, 6, journal=Journal(path), progress=killed_after_four, **options)
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    with path.open("a") as file:
        file.write(lines[0][:60])  # a line cut off by the kill

    ran = []
    generate = tta_ext.KnapsackDeferral.generate
    monkeypatch.setattr(
        tta_ext.KnapsackDeferral,
        "generate",
        lambda *a, **k: ran.append(k["sequence"]) or generate(*a, **k),
    )
    rows = evaluate(pair, settings, 6, journal=Journal(path), **options)
    assert [timeless(row) for row in rows] == [timeless(row) for row in whole]
    assert ran == [[2, 3], [4, 5]]
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 6


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("base", evaluation.Setting("base")),
        ("threshold:0.4", evaluation.Setting("threshold", 0.4)),
        ("dual_kad:0.4", evaluation.Setting("threshold", 0.4)),
        ("knapsack:0.9:split", evaluation.Setting("knapsack", 0.9, "split")),
        ("argmax", evaluation.Setting("argmax")),
        ("implicit_reward:1", evaluation.Setting("implicit_reward", 1.0)),
    ],
)
def test_settings_parse(text, setting):
    assert evaluation.Setting.parse(text) == setting


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "rule is ''"),
        ("nonsense:1", "nonsense"),
        ("threshold", "threshold:0.4"),
        ("threshold:x", "threshold:x"),
        ("knapsack:0.5:most", "most"),
        ("base:0.5", "base:0.5"),
        ("threshold:0.4:split", "threshold has no critical item"),
    ],
)
def test_bad_settings_are_named(text, named):
    with pytest.raises(ValueError, match=named):
        evaluation.Setting.parse(text)


def test_bad_arguments_are_named(pair):
    with pytest.raises(ValueError, match="n is 0"):
        task.evaluation_task(0)
    with pytest.raises(ValueError, match="n is 2, expected 1 to 1 "):
        task.evaluation_task(2, skip=task.MOST_PROBLEMS - 1)
    with pytest.raises(ValueError, match="warm"):
        evaluate(pair, ["base"], 1, modes=["warm"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(pair, ["base"], 1, batch_size=0)


def test_table_and_summary(small_run):
    rows = small_run
    assert len(demo_pair.table(rows).splitlines()) == 2 + len(rows)
    result = demo_pair.summary(rows)
    assert result["greedy"]["kad"] == "threshold 0.4"
    assert result["greedy"]["over_base_lenient"][0] == pytest.approx(
        rows[4].exact - rows[0].lenient
    )
    # One setting a rule for both modes, the best rule first.
    best = demo_pair.chosen([*rows, *(replace(row, exact=0.0, setting=OTHER) for row in rows[4:])])
    assert best[0].rule == "threshold"
    assert OTHER not in best
    assert len(best) == 3
    json.dumps([result, *(row.as_dict() for row in rows)], allow_nan=False)
    run = {
        "command": "x",
        "n": 40,
        "tuning": 40,
        "kad": "threshold 0.4",
        "seed": 0,
        "pair": "",
        "torch": "",
        "threads": 1,
        "batch_size": 40,
    }
    speeds = [{"rows": 1, "plain": 300, "speculative": 400}]
    page = demo_pair.report(run | {"summary": result, "speeds": speeds}, rows, rows[:1])
    assert "format-free" in page
    assert "| 1 | 300 | 400 |" in page
    assert demo_pair.table(rows) in page
    assert demo_pair.table(rows[:1]) in page
    mean, error = evaluation.difference(rows[4], rows[4])
    assert mean == error == 0.0


# ---- training --------------------------------------------------------------------------------


def test_packed_rows_keep_documents_whole(pair):
    texts = [text for text, _ in islice(corpus.raw_documents(0, "final"), 300)]
    rows = list(islice(train.packed_rows(iter(texts * 2), pair.tokenizer), 60))
    eos = pair.tokenizer.eos_token_id
    seen = set()
    for row in rows:
        assert len(row) <= train.ROW
        assert row[-1] == eos
        seen.update(pair.tokenizer.decode(row).split("<eos>")[:-1])
    assert seen <= set(texts)
    assert sum(map(len, rows)) > 0.9 * len(rows) * train.ROW


def test_training_is_reproducible(tmp_path, monkeypatch):
    """The whole script at one step a stage, twice."""
    tiny = train.Shape(hidden=16, layers=1, heads=2, feed_forward=16)
    monkeypatch.setattr(train, "BASE", tiny)
    monkeypatch.setattr(train, "PROXY", tiny)
    original = train.train_tokenizer
    monkeypatch.setattr(train, "train_tokenizer", lambda: original(500))
    for name in ("one", "two"):
        train.train_pair(tmp_path / name, scale=1e-6)
    for model in ("base", "proxy", "proxy_init"):
        files = [tmp_path / name / model / "model.safetensors" for name in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        tokenizers = [file.with_name("tokenizer.json").read_bytes() for file in files]
        assert tokenizers[0] == tokenizers[1]
        config = json.loads(files[0].with_name("config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(ValueError, match="scale"):
        train.train_pair(tmp_path, scale=0)

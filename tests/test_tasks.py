"""The papers' tasks: readers of the published records, scorers, a run of the shipped pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tta_ext.cli.app import run as cli
from tta_ext.cli.common import load_models
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems
from tta_ext.evaluation import Setting
from tta_ext.tasks import TASKS, Problem, Scores, load_task, run

PROBLEMS = evaluation_problems(6)

RECORDS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "gsm8k": (
        {"question": "A hen lays 3 eggs a day. In 400 days?", "answer": "3*400\n#### 1,200"},
        "1200",
        [],
    ),
    "math500": (
        {"problem": "What is $1/2+1/4$?", "answer": "\\frac{3}{4}", "solution": "", "level": 1},
        "\\frac{3}{4}",
        [],
    ),
    "svamp": ({"Body": "Ann has 5 hats.", "Question": "How many?", "Answer": "5.0"}, "5", []),
    "arc_c": (
        {
            "question": "Which is a metal?",
            "choices": {"text": ["wood", "iron"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        "B",
        ["wood", "iron"],
    ),
    "csqa": (
        {
            "question": {
                "stem": "Where do fish live?",
                "choices": [{"label": "A", "text": "sea"}, {"label": "B", "text": "sky"}],
            },
            "answerKey": "A",
        },
        "A",
        ["sea", "sky"],
    ),
    "truthfulqa": (
        {
            "question": "Do frogs sing opera?",
            "mc1_targets": {"choices": ["No", "Yes", "At night"], "labels": [1, 0, 0]},
        },
        "",
        ["No", "Yes", "At night"],
    ),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", ["jsonl", "list"])
def test_records_as_they_are_published(name: str, form: str, tmp_path: Path) -> None:
    record, answer, choices = RECORDS[name]
    path = tmp_path / "data"
    path.write_text(json.dumps([record] * 3) if form == "list" else f"{json.dumps(record)}\n" * 3)
    (one, other) = load_task(name, path, 2)
    assert one == other
    assert sorted(one.choices.values()) == sorted(choices)
    if answer:
        assert one.answer == answer
    else:
        assert one.choices[one.answer] == "No"
    for letter, text in one.choices.items():
        assert f"\n{letter}. {text}\n" in one.question
    assert one.prompt == [{"role": "user", "content": one.question}]


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "x"}\n')
    with pytest.raises(ValueError, match=r"record 1 of .* is not one of gsm8k: KeyError 'answer'"):
        load_task("gsm8k", path)
    with pytest.raises(ValueError, match="task is 'gsm', expected one of gsm8k"):
        load_task("gsm", path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no problems"):
        load_task("gsm8k", path)


FREE = Problem("?", "1200", {})
HALF = Problem("?", "\\frac{3}{4}", {})
TERM = Problem("?", "x^2 + 1", {})
LETTER = Problem("?", "B", {"A": "wood", "B": "iron"})


@pytest.mark.parametrize(
    ("problem", "text", "wanted"),
    [
        (FREE, "so we get 1,200 eggs. #### 1200", Scores(True, True, True)),
        (FREE, "The answer is 1,200.", Scores(True, True, True)),
        (FREE, "\\boxed{1200} and no more", Scores(True, True, True)),
        (FREE, "1200 eggs, which is 100 a month", Scores(True, False, False)),
        (FREE, "12000 or 11200 or 1200.5", Scores(False, False, False)),
        (FREE, "The answer is 7. The answer is 1200.0", Scores(True, True, True)),
        (FREE, "#### 1200\nwait, no: #### 7", Scores(True, False, False)),
        (FREE, "", Scores(False, False, False)),
        (HALF, "It is 0.75", Scores(True, True, False)),
        (HALF, "so \\boxed{\\dfrac{3}{4}}", Scores(True, True, True)),
        (HALF, "the answer is 3/4", Scores(True, True, True)),
        (TERM, "Thus $\\boxed{x^2+1}$.", Scores(False, True, True)),
        (TERM, "x^2 + 1", Scores(True, False, False)),
        (LETTER, "B", Scores(True, True, False)),
        (LETTER, "The answer is B. iron", Scores(True, True, True)),
        (LETTER, "The answer is (B)", Scores(True, True, True)),
        (LETTER, "Iron is a metal", Scores(True, False, False)),
        (LETTER, "B? No, the answer is A", Scores(True, False, False)),
        (LETTER, "The answer is iron.", Scores(True, False, True)),
        (LETTER, "environment", Scores(False, False, False)),
    ],
)
def test_three_scorers(problem: Problem, text: str, wanted: Scores) -> None:
    assert problem.score(text) == wanted


def test_the_command_takes_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "gsm8k.jsonl", tmp_path / "rows.json"
    records = [{"question": one.question, "answer": f"#### {one.answer}"} for one in PROBLEMS]
    data.write_text("\n".join(map(json.dumps, records)))
    folders = []
    for name in ("base", "proxy"):
        folders.append(tmp_path / name)
        shutil.copytree(ASSETS / name, folders[-1])
        config = folders[-1] / "tokenizer_config.json"
        changes = {"chat_template": TEMPLATE} if name == "proxy" else {}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    command = [
        *("eval", "threshold:0.4", "--task", "gsm8k", "--data", str(data), "--samples", "2"),
        *("--base", str(folders[0]), "--proxy", str(folders[1]), "--output", str(out)),
        *("--max-new-tokens", "40"),
    ]
    assert cli(command) == 0
    (row,) = json.loads(out.read_text())
    assert (row["n"], row["samples"], row["rule"]) == (len(PROBLEMS), 2, "threshold")
    assert 0 < row["exact"] <= row["exact_pass"] <= 1
    assert "pass@2" in capsys.readouterr().out
    assert cli([*command, "--mode", "greedy"]) == 1
    assert "--task does not use --mode" in capsys.readouterr().err
    assert cli([*command, "--engine", "ray"]) == 1
    assert "--task does not use --engine" in capsys.readouterr().err
    assert cli(["eval", "--task", "gsm8k"]) == 1
    assert "--task gsm8k needs --data" in capsys.readouterr().err
    assert cli(["eval", "--samples", "2"]) == 1
    assert "an evaluation without --task does not use --samples" in capsys.readouterr().err


TEMPLATE = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"


def test_a_run_does_not_depend_on_batches_and_drafts() -> None:
    models = load_models(None, None)
    problems = [Problem(one.question, str(one.answer), {}) for one in PROBLEMS]
    options: dict[str, Any] = {"samples": 3, "max_new_tokens": 40, "chat_template": TEMPLATE}
    settings = [Setting("threshold", 0.4), Setting("base")]
    rows = list(run(models, problems, settings, batch_size=9, **options))
    again = list(run(models, problems, settings, batch_size=6, window=0, **options))
    for one, other in zip(rows, again, strict=True):
        for name in ("string", "numeric", "exact"):
            for field in (name, f"{name}_stderr", f"{name}_pass"):
                assert getattr(one, field) == getattr(other, field)
        assert one.tokens == other.tokens
        assert (one.n, one.samples) == (6, 3)
        assert one.string >= one.exact
        assert one.exact <= one.exact_pass
    assert rows[0].exact > 0
    assert 0 < rows[0].acceptance_rate < 1
    assert again[0].acceptance_rate == 0
    assert rows[0].as_dict()["rule"] == "threshold"
    with pytest.raises(ValueError, match="samples is 65, expected 1 to 64"):
        next(run(models, problems, settings, samples=65))
    with pytest.raises(ValueError, match="chat template"):
        next(run(models, problems, settings))

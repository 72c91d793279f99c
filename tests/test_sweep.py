"""``tta sweep --axis``: grids, Optuna, paired differences, the line that uses the winner."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from models import base_model, make_tokenizer, proxy_model

import tta_ext
from tta_ext import plots, sweep
from tta_ext.sweep import Range, Trial


def test_line_of_python_has_no_bound() -> None:
    ((name, values),) = [sweep.parse_axis("kl_budget=None,48.0,inf")]
    assert values == [None, 48.0, math.inf]
    line = sweep.call("dict", "1", {name: values[-1], "n": 4})
    assert eval(line.replace("tta_ext.dict(1", "dict(x=1")) == {"x": 1, name: math.inf, "n": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = {}
    for name, model in (("base", base_model()), ("proxy", proxy_model())):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        where[name] = str(folder)
    return where


def test_axes_and_grids() -> None:
    axes = dict(
        map(sweep.parse_axis, ["sigma=0.1:0.3:0.1", "lam=None,0.5", "decoding=greedy,sample"])
    )
    assert axes == {
        "sigma": [0.1, 0.2, 0.3],
        "lam": [None, 0.5],
        "decoding": ["greedy", "sample"],
    }
    found = sweep.grid(axes)
    assert len(found) == 12
    assert found[1] == {"sigma": 0.1, "lam": None, "decoding": "sample"}
    assert sweep.parse_axis("sigma=0.1..2:log") == ("sigma", Range(0.1, 2.0, True))
    for wrong in ("sigma", "sigma=", "sigma=1:2:0", "sigma=2..1", "sigma=0..1:log", "=1"):
        with pytest.raises(ValueError, match="expected name=a,b,c"):
            sweep.parse_axis(wrong)
    # As they are written: a setting of whole numbers takes no fractions.
    assert sweep.parse_axis("n=4:16:4") == ("n", [4, 8, 12, 16])
    (_, n), (_, half) = map(sweep.parse_axis, ("n=4:16:4", "n=4:6.0:1"))
    assert [type(value) for value in (*n, *half)] == [int] * 4 + [float] * 3
    (_, ends) = sweep.parse_axis("n=4..16")
    assert isinstance(ends, Range) and isinstance(ends.low, int) and isinstance(ends.high, int)
    changed = sweep.fractional({"n": ends, "x": ends, "y": [1]}, ["x", "y"])
    assert isinstance(changed["x"], Range) and isinstance(changed["x"].low, float)
    assert changed["n"] is ends and changed["y"] == [1]
    with pytest.raises(ValueError, match="axis sigma is a range"):
        sweep.grid({"sigma": Range(0.1, 1.0)})
    with pytest.raises(ValueError, match="more than 10000"):
        sweep.grid({str(i): list(range(10)) for i in range(5)})


def test_table_has_paired_differences(tmp_path: Path) -> None:
    trials = [
        Trial({}, (1.0, 2.0, 4.0)),
        Trial({"lam": 0.5}, (2.0, 2.0, 5.0)),
        Trial({"lam": 1.0}, (1.0, 2.0, 4.0)),
    ]
    rows = sweep.table(trials)
    assert [row["difference"] for row in rows] == pytest.approx([0.0, 2 / 3, 0.0])
    assert (rows[1]["wins"], rows[1]["ties"], rows[1]["losses"]) == (2, 1, 0)
    # Deviations of 1, 0, 1 about 2/3, over the root of 3.
    assert rows[1]["difference_error"] == pytest.approx((1 / 3) ** 0.5 / 3**0.5)
    assert rows[2]["low"] == rows[2]["high"] == 0.0
    assert sweep.winner(trials) is trials[1]
    read = list(csv.DictReader(sweep.as_csv(rows).splitlines()))
    assert [row["lam"] for row in read] == ["", "0.5", "1.0"]
    assert float(read[1]["difference"]) == pytest.approx(2 / 3)
    picture = tmp_path / "trials.svg"
    sweep.plot(trials, picture, "three")
    assert plots.MARK.search(picture.read_bytes())


def test_optuna_finds_a_maximum() -> None:
    pytest.importorskip("optuna")

    def score(settings: dict[str, Any]) -> Trial | None:
        if settings["kind"] == "no":
            return None
        return Trial(settings, (-((settings["x"] - 0.3) ** 2),))

    axes: dict[str, Any] = {"x": Range(0.0, 1.0), "kind": ["yes", "no"]}
    found = list(sweep.suggested(axes, score, 40, 0))
    assert all(trial.settings["kind"] == "yes" for trial in found)
    assert abs(sweep.winner(found).settings["x"] - 0.3) < 0.1
    again = [trial.settings for trial in sweep.suggested(axes, score, 40, 0)]
    assert again == [trial.settings for trial in found]
    whole: dict[str, Any] = {"x": Range(1, 9), "kind": ["yes"]}
    assert all(type(trial.settings["x"]) is int for trial in sweep.suggested(whole, score, 5, 0))


def test_refused_trials_are_told(capsys: Any, folders: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "ab"}) + "\n")
    words = [
        "sweep", "--reward", "letter:s", "--method", "best_of_n", "--samples", "4", "--search",
        "optuna", "--trials", "3", "--max-new-tokens", "2", "--set", "eos_token_id=[]",
        "--model", folders["base"], "--data", str(data), "--axis",
    ]  # fmt: skip
    status, _, err = call(capsys, *words, "group=1..4")
    assert (status, "of no use" in err) == (0, False)
    status, _, err = call(capsys, *words, "group=1.0..1.5")
    assert status == 1
    assert "3 of 3 trials were of no use: setting group is 1." in " ".join(err.split())


def test_rewards_may_be_infinite(tmp_path: Path) -> None:
    no = -math.inf
    trials = [Trial({}, (no, 1.0)), Trial({"a": 1}, (2.0, 1.0)), Trial({"a": 2}, (no, 3.0))]
    rows = sweep.table(trials)
    assert [row["mean"] for row in rows] == [no, 1.5, no]
    assert [row["difference"] for row in rows] == [0.0, math.inf, 1.0]
    assert math.isnan(rows[0]["error"]) and math.isnan(rows[1]["low"])
    assert (rows[1]["wins"], rows[1]["ties"]) == (1, 1)
    assert sweep.winner(trials) is trials[1]
    sweep.as_csv(rows)
    if importlib.util.find_spec("matplotlib"):
        sweep.plot(trials, tmp_path / "trials.png", "infinite")


def test_sweep_of_a_rule(capsys: Any, folders: dict[str, str], tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "report.json"
    table = tmp_path / "trials.csv"
    alone = tta_ext.KnapsackDeferral(
        base_model(), proxy_model(), make_tokenizer(), rule="threshold", param=0.0
    ).generate(["ab", "cd", "ef"], max_new_tokens=4, do_sample=False)
    records = zip(("ab", "cd", "ef"), alone.texts or (), strict=True)
    data.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in records))
    arguments = [
        "sweep", "--axis", "rule=threshold,nudging", "--axis", "param=0,1.5",
        "--base", folders["base"], "--proxy", folders["proxy"], "--data", str(data),
        "--mode", "greedy", "--max-new-tokens", "4", "--seeds", "0,1", "--csv", str(table),
        "--output", str(output),
    ]  # fmt: skip
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    report = json.loads(output.read_text())
    assert len(report["trials"]) == 5
    assert report["winner"] == {"rule": "threshold", "param": 0}
    assert report["trials"][1]["mean"] == 1.0
    assert report["trials"][1]["scores"] == 6
    assert len(list(csv.DictReader(table.open()))) == 5
    line = out.strip().splitlines()[-1]
    names = {"tta_ext": tta_ext, "base": base_model(), "proxy": proxy_model()}
    made = eval(line, names | {"tokenizer": make_tokenizer()})
    assert made.rule == tta_ext.Rule("threshold", 0.0)


def test_implicit_reward_on_an_axis_has_its_anti(
    capsys: Any, folders: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "ab", "answer": "x"}) + "\n")
    words = [
        "sweep", "--axis", "rule=implicit_reward,nudging", "--base", folders["base"],
        "--proxy", folders["proxy"], "--anti", folders["base"], "--data", str(data),
        "--mode", "greedy", "--max-new-tokens", "2",
    ]  # fmt: skip
    assert call(capsys, *words)[0] == 0  # the default's rule needs none
    status, out, _ = call(capsys, *words, "--rule", "implicit_reward")
    assert status == 0
    assert ", anti=anti, rule='implicit_reward'" in out.strip().splitlines()[-1]


def test_sweep_of_a_search(capsys: Any, folders: dict[str, str], tmp_path: Path) -> None:
    data, journal = tmp_path / "prompts.jsonl", tmp_path / "journal.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("ab", "cd")))
    arguments = [
        "sweep", "--reward", "letter:s", "--axis", "guard_lam=0,1", "--set", "guard=fisher",
        "--set", "n=2", "--set", "eos_token_id=[]", "--samples", "4", "--max-new-tokens", "4",
        "--model", folders["base"], "--data", str(data), "--journal", str(journal),
    ]  # fmt: skip
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    assert len(journal.read_text().splitlines()) == 6  # three trials of two prompts
    line = out.strip().splitlines()[-1]
    names: dict[str, Any] = {"tta_ext": tta_ext, "model": base_model(), "reward": lambda p, r: []}
    made = eval(line, names | {"tokenizer": make_tokenizer()})
    assert made.settings.guard == "fisher"
    assert made.settings.max_new_tokens == 4
    again, _, _ = call(capsys, *arguments)
    assert again == 0
    assert len(journal.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axis", "lam=1"], "axis is 'lam', expected one of rule, param"),
        (["--axis", "param=1", "--params", "1,2"], "does not use --params"),
        (["--trials", "3"], "a sweep without --axis does not use --trials"),
        (["--axis", "param=1", "--samples", "3"], "does not use --samples"),
        (["--axis", "lam=1", "--reward", "letter:s"], "needs --data"),
        (["--axis", "param=1", "--seeds", "x"], "--seeds is 'x'"),
        (["--axis", "n=2", "--reward", "letter:s", "--batch-size", "2"], "not use --batch-size"),
        (["--axis", "param=1", "--anti", "x"], "rule threshold does not use --anti"),
        (
            [
                *("--axis", "n=2", "--reward", "letter:s", "--data", "x"),
                *("--max-new-tokens", "2", "--set", "max_new_tokens=3"),
            ],
            "--set max_new_tokens=... does not use --max-new-tokens",
        ),
    ],
)
def test_what_a_sweep_refuses(capsys: Any, arguments: list[str], message: str) -> None:
    status, _, err = call(capsys, "sweep", *arguments)
    assert status == 1
    assert message in " ".join(err.split())


def test_scores_of_one_prompt_have_no_error() -> None:
    assert torch.tensor(Trial({}, (1.0,)).error).isnan()
    assert Trial({"a": 1, "b": "x"}, (1.0,)).label == "a=1 b=x"
    assert Trial({}, (1.0,)).label == "default"

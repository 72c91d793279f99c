"""The comparison of search methods: budgets, pairs, journals, summaries."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from models import base_model, make_tokenizer
from scipy import stats
from searches import PROMPTS, vowels

from tta_ext.decoding.search import base
from tta_ext.decoding.search import compare as comparison
from tta_ext.journal import Journal

CONTESTANTS = ["aisp:n=4,sigma=0.4", "plain=best_of_n:group=4", "chunk_beam:beams=2,branches=2"]


def run(journal: Journal | None = None, **options: Any) -> list[dict[str, Any]]:
    return comparison.compare(
        base_model(),
        make_tokenizer(),
        vowels,
        PROMPTS,
        [comparison.Contestant.parse(text) for text in CONTESTANTS],
        common={"max_new_tokens": 6},
        journal=journal,
        **({"samples": 8} | options),
    )


def test_compare_resumes_and_pairs(tmp_path: Any, monkeypatch: Any) -> None:
    path = tmp_path / "journal.jsonl"
    whole = run(Journal(path))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole) == 9
    path.write_text("".join(lines[:4]))

    def timeless(records: Any) -> list[tuple[Any, ...]]:
        return [(r["key"], r["index"], r["label"], r["reward"], r["text"]) for r in records]

    assert timeless(run(Journal(path))) == timeless(whole)
    again = path.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4]
    assert timeless(map(json.loads, again)) == timeless(map(json.loads, lines))
    with monkeypatch.context() as patch:
        patch.setattr(base.SearchMethod, "generate", pytest.fail)
        assert timeless(run(Journal(path))) == timeless(whole)
    run(Journal(path), tag="another model")
    assert len(path.read_text().splitlines()) == 18
    by_prompt = [r["reward"] for r in whole if r["label"] == "plain"]
    steered = [r["reward"] for r in whole if r["label"] == CONTESTANTS[0]]
    pair = comparison.paired(whole, "plain")[0]
    differences = [a - b for a, b in zip(steered, by_prompt, strict=True)]
    assert pair.difference == pytest.approx(sum(differences) / 3)
    assert pair.error == pytest.approx(stats.sem(differences))
    assert pair.low <= pair.difference <= pair.high
    assert pair.wins + pair.ties + pair.losses == pair.prompts == 3
    rows = comparison.summary(whole)
    assert [row["label"] for row in rows] == [CONTESTANTS[0], "plain", CONTESTANTS[2]]
    assert all(row["tokens"] <= 8 * 6 for row in rows)
    with pytest.raises(ValueError, match="baseline is 'x'"):
        comparison.paired(whole, "x")


def test_compare_by_seconds_and_plot(tmp_path: Any, monkeypatch: Any) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(base, "perf_counter", lambda: 0.02 * next(ticks))
    records = run(samples=None, seconds=0.05)
    for record in records:  # a tick to begin, a tick an iteration, until none is left
        seconds = [point["seconds"] for point in record["curve"]]
        assert seconds == pytest.approx([0.04, 0.06])
    for axis in ("samples", "tokens", "seconds"):
        for xs, ys in comparison.curve_means(records, axis, points=20).values():
            assert xs == sorted(xs)
            assert ys == sorted(ys)
    pytest.importorskip("matplotlib")
    comparison.plot(records, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="expected one budget"):
        run(seconds=1.0)


def test_metrics_are_measured_of_the_best_answers(tmp_path: Any) -> None:
    def size(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(len(p) - len(r)) for p, r in zip(prompts, responses, strict=True)]

    path = tmp_path / "journal.jsonl"
    plain = run(Journal(path))
    lines = path.read_text()
    records = run(Journal(path), metrics={"size": size})
    assert path.read_text() == lines
    assert [r | {"metrics": {}} for r in records] == [r | {"metrics": {}} for r in plain]
    for r in records:
        assert r["metrics"] == {"size": len(r["prompt"]) - len(r["text"])}
    for row in comparison.summary(records):
        own = [r["metrics"]["size"] for r in records if r["label"] == row["label"]]
        assert row["metrics"]["size"] == pytest.approx((sum(own) / 3, stats.sem(own)))
        last = [r["curve"][-1]["kl"] for r in records if r["label"] == row["label"]]
        if None not in last:
            assert (row["kl"], row["kl_error"]) == pytest.approx((sum(last) / 3, stats.sem(last)))
    assert all(row["metrics"] == {} for row in comparison.summary(plain))
    with pytest.raises(ValueError, match="answers have none; pass a tokenizer"):
        comparison.measure([{"prompt": [1], "text": None}], {"size": size})


def test_infinite_rewards_come_back_from_a_journal(tmp_path: Any) -> None:
    path = tmp_path / "journal.jsonl"

    def ruled_out(prompts: list[Any], responses: list[Any]) -> list[float]:
        return [-math.inf] * len(responses)

    records = [
        comparison.compare(
            base_model(), make_tokenizer(), ruled_out, PROMPTS[:1],
            [comparison.Contestant.parse("best_of_n:group=2")], samples=2,
            common={"max_new_tokens": 2}, journal=Journal(path),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert len(path.read_text().splitlines()) == 1
    for (record,) in records:
        assert record["reward"] == record["curve"][0]["mean"] == -math.inf
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_prompt_that_cannot_be_answered_is_left_out(tmp_path: Any) -> None:
    failures: dict[int, Exception] = {}
    asked = [PROMPTS[0], None, PROMPTS[1]]
    arguments = (base_model(), make_tokenizer(), vowels, asked)
    contestants = [comparison.Contestant.parse(text) for text in CONTESTANTS[:2]]
    options: dict[str, Any] = {"samples": 4, "common": {"max_new_tokens": 2}}
    records = comparison.compare(
        *arguments, contestants, prompts_at_once=3, failures=failures, **options
    )
    assert list(failures) == [1]
    assert [record["index"] for record in records] == [0, 0, 2, 2]
    assert comparison.paired(records, "plain")[0].prompts == 2
    with pytest.raises(type(failures[1])):
        comparison.compare(*arguments, contestants, **options)


def test_infinite_rewards_have_a_summary() -> None:
    point = dict.fromkeys(("kl", "norm", "ess")) | {"samples": 1}
    timing = dict.fromkeys(("tokens", "total", "model", "reward", "other"), 1.0)
    records = [
        {"label": label, "index": i, "reward": r, "curve": [point | {"mean": r}], "timing": timing}
        for label, rewards_ in (("a", [-math.inf, 1.0]), ("b", [1.0, -math.inf]))
        for i, r in enumerate(rewards_)
    ]
    assert math.isnan(comparison.paired(records, "a")[0].difference)
    assert [row["reward"] for row in comparison.summary(records)] == [-math.inf, -math.inf]


def test_parsing_of_contestants() -> None:
    one = comparison.Contestant.parse("mine=best-of-n:n=4,soft=0.5,decoding=greedy")
    assert (one.label, one.method) == ("mine", "best_of_n")
    assert one.settings == {"n": 4, "soft": 0.5, "decoding": "greedy"}
    assert comparison.Contestant.parse("args").label == "args"
    assert comparison.Contestant.parse("aisp:kl_budget=inf").settings == {"kl_budget": math.inf}
    with pytest.raises(ValueError, match="method is 'nothing', expected one of aisp"):
        comparison.Contestant.parse("nothing")
    with pytest.raises(ValueError, match="setting is 'n', expected name=value"):
        comparison.Contestant.parse("args:n")
    with pytest.raises(ValueError, match="expected different ones"):
        comparison.compare(
            base_model(), None, vowels, [], [comparison.Contestant.parse("args")] * 2
        )

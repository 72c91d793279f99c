"""What results say of themselves: ``repr``, tables of pandas; and that the site shows all of it."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from models import base_model, make_tokenizer, proxy_model

import tta_ext
from tta_ext import decoding, evaluation, frames
from tta_ext.decoding import rewards
from tta_ext.journal import Journal

API = Path(__file__).resolve().parent.parent / "docs" / "api"
# What needs packages that are not installed everywhere.
FOREIGN = ("tta_ext.engines.", "tta_ext.lm_eval", "tta_ext.serving")


def shown() -> dict[str, Any]:
    """What the site's API pages name, where it can be imported."""
    found = {}
    for page in API.glob("*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            home, _, name = path.rpartition(".")
            try:
                found[path] = importlib.import_module(path)
            except ImportError as error:
                if isinstance(error, ModuleNotFoundError) and error.name == path:
                    found[path] = getattr(importlib.import_module(home), name)
                elif not path.startswith(FOREIGN):
                    raise
    return found


def public() -> Iterator[tuple[str, Any]]:
    """Every object that is public by a page or a list of names."""
    for path, thing in shown().items():
        if inspect.ismodule(thing):
            yield from ((f"{path}.{name}", getattr(thing, name)) for name in thing.__all__)
        else:
            yield path, thing
    for module in (tta_ext, decoding, tta_ext.ops):
        yield from ((f"{module.__name__}.{n}", getattr(module, n)) for n in module.__all__)


def test_the_site_shows_every_public_name() -> None:
    known = {id(thing) for thing in shown().values()}
    for thing in shown().values():
        if inspect.ismodule(thing):
            known |= {id(getattr(thing, name)) for name in thing.__all__}
    missing = [
        f"{module.__name__}.{name}"
        for module in (tta_ext, decoding, tta_ext.ops)
        for name in module.__all__
        if name not in ("__version__", "decoding", "ops", "rules")
        and id(getattr(module, name)) not in known
    ]
    assert not missing


def test_every_public_object_has_a_docstring_and_a_repr() -> None:
    for name, thing in public():
        if inspect.isfunction(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), name
        if inspect.isclass(thing) and not getattr(thing, "_is_protocol", False):
            assert thing.__repr__ is not object.__repr__, f"repr of {name} is an address"


def test_reprs_name_the_class_and_fit(tmp_path: Path) -> None:
    kad = decoding.KnapsackDeferral(base_model(), proxy_model(), make_tokenizer())
    reward = rewards.WeightedReward([(1.0, rewards.LetterReward("s")), (0.5, rewards.JsonReward())])
    best = decoding.BestOfN(base_model(), reward, make_tokenizer(), n=2, max_new_tokens=2)
    search = best.start(["ab", "cd"], seed=0)
    search.step()
    task = evaluation.Task(["ab"], lambda place, text: evaluation.Score(True, True, True))
    models = evaluation.Models(base_model(), proxy_model(), None)
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add({"key": {"x": 1}})
        assert "1 items" in repr(journal)
        things = [
            kad,
            kad.chat(),
            kad.generate("ab", max_new_tokens=2, seed=0, trace=True),
            reward,
            best,
            search,
            search.result(),
            journal,
            tta_ext.use_backend("reference"),
            tta_ext.Rule("knapsack", 0.5),
            evaluation.Answering(models, task.prompts),
        ]
    for thing in things:
        assert type(thing).__name__ in repr(thing)
        assert " at 0x" not in repr(thing)
    assert "2 prompts" in repr(search)
    assert "iteration 1 of 1" in repr(search)
    assert repr(reward) == (
        "WeightedReward([(1.0, LetterReward('s', distinct=False)), (0.5, JsonReward())])"
    )


def test_tables_of_a_generation() -> None:
    pytest.importorskip("pandas")
    kad = decoding.KnapsackDeferral(base_model(), proxy_model(), make_tokenizer())
    options: dict[str, Any] = {"rule": "knapsack", "param": 0.4, "max_new_tokens": 5, "seed": 0}
    result = kad.generate(["ab", "cdef"], trace=True, **options)
    answers, tokens = result.to_pandas(), result.to_pandas("tokens")
    assert answers["tokens"].tolist() == list(map(len, result.tokens))
    assert answers["text"].tolist() == result.texts
    assert answers["deferred_tokens"].sum() == sum(map(sum, result.deferred))
    assert tokens["token"].tolist() == [one for row in result.tokens for one in row]
    assert tokens["answer"].tolist() == [i for i, row in enumerate(result.tokens) for _ in row]
    assert ((tokens["source"] == "proxy") == tokens["deferred"]).all()
    assert tokens["p"].between(0, 1).all()
    assert "p" not in kad.generate("ab", **options).to_pandas("tokens")
    with pytest.raises(ValueError, match="of is 'rows', expected answers or tokens"):
        result.to_pandas("rows")


def test_tables_of_a_search_and_of_evaluations() -> None:
    pytest.importorskip("pandas")
    aisp = decoding.AdaptiveImportanceSampling(
        base_model(), rewards.LengthReward(3), make_tokenizer(), n=3, iterations=2, max_new_tokens=3
    )
    result = aisp.generate(["ab", "cd"], seed=0)
    assert len(result.to_pandas()) == 2
    assert len(result.to_pandas("candidates")) == 2 * 6
    curve = result.to_pandas("iterations")
    assert curve["prompt"].tolist() == [0, 0, 1, 1]
    assert curve["best"].tolist() == [one.best for row in result.curves for one in row]
    with pytest.raises(ValueError, match="expected one of best, candidates, iterations"):
        result.to_pandas("rows")
    models = evaluation.Models(base_model(), proxy_model(), make_tokenizer())
    task = evaluation.Task(["ab"], lambda place, text: evaluation.Score(True, True, False), 2)
    rows = list(evaluation.evaluate(models, task, ["base", "threshold:0.4"], modes=["greedy"]))
    table = frames.to_pandas(rows)
    assert table["rule"].tolist() == ["base", "threshold"]
    assert table["exact"].tolist() == [1.0, 1.0]


def test_without_pandas_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'tables need pandas: pip install "\.\[pandas\]"'):
        frames.to_pandas([])

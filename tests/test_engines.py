"""Deferral in the batches of foreign engines: the draw, rows that move, a proxy that follows."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from foreign import NEW, PROXY, RULES, SEED, last_logits, wanted

from tta_ext import ops
from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.runtime.runner import Runner
from tta_ext.engines.rows import Asked, Row, RowTable, draw, group, source
from tta_ext.engines.vllm.stash import Stash
from tta_ext.rules import Rule

# ---- the draw ------------------------------------------------------------------------------------


def test_a_row_has_no_other_choice_and_says_where_it_came_from() -> None:
    torch.manual_seed(0)
    base, other = torch.randn(6, 40) * 3, torch.randn(6, 40) * 3
    base[:, 7] = -math.inf
    rule = Rule("confidence_bet", 0.1, temperature=0.8)
    asked = {row: Asked(rule, 5, row, told=True) for row in (0, 2, 3, 5)}
    logits, position = base.clone(), torch.arange(6) + 10
    groups = group(asked, logits.device)
    assert [one.rows for one in groups] == [[0, 2, 3, 5]]
    draw(logits, groups, position, lambda one: other.index_select(0, one.index))
    rows = list(asked)
    masked = other[rows].masked_fill(base[rows] == -math.inf, -math.inf)
    drawn = ops.deferral_sample(
        base[rows], masked, rule=rule, seed=5, position=position[rows],
        sequence=torch.tensor(rows),
    )  # fmt: skip
    mass = ops.deferral_stats(base[rows], masked, rule=rule).deferred_mass
    assert drawn.deferred.any()
    assert not drawn.deferred.all()
    for place, row in enumerate(rows):
        (token,) = logits[row].isfinite().nonzero().flatten().tolist()
        assert token == drawn.token[place]
        told = source(float(logits[row, token] / 0.8))
        assert told.deferred == drawn.deferred[place]
        assert told.mass == pytest.approx(float(mass[place]), abs=1e-6)
    assert torch.equal(logits[[1, 4]], base[[1, 4]])


def test_groups_are_as_few_as_one_call_can_serve() -> None:
    asked = {
        3: Asked(Rule("threshold", 0.4), 1),
        0: Asked(Rule("threshold", 0.6), 1),
        1: Asked(Rule("threshold", 0.6), 2),
        2: Asked(Rule("argmax", None), 1),
        4: Asked(Rule("threshold", 0.4), 1, do_sample=False),
    }
    found = group(asked, torch.device("cpu"))
    assert [one.rows for one in found] == [[0, 3], [1], [2], [4]]
    assert found[0].rule.param.tolist() == [0.6, 0.4]  # type: ignore[union-attr]


def test_no_law_is_an_error_that_names_the_request() -> None:
    logits = torch.full((2, 8), math.nan)
    groups = group({1: Asked(Rule("threshold", 0.1), 1, 12)}, logits.device)
    with pytest.raises(ValueError, match=r"tta_sequence 12 have NaN .* at position 4"):
        draw(logits, groups, torch.tensor([0, 4]), lambda one: logits[:1])


def test_the_table_follows_moves() -> None:
    left: list[Row] = []
    table = RowTable(left.append)
    a, b, c = (Row(Asked(Rule("threshold", 0.1)), [1], []) for _ in range(3))
    table.put(0, a)
    table.put(1, b)
    table.move(0, 1, swap=True)
    assert (table[0], table[1]) == (b, a)
    table.move(1, 4)
    assert table[4] is a
    assert len(table) == 2
    table.put(4, c)
    assert left == [a]
    table.move(0, 4)
    assert left == [a, c]
    table.move(2, 4)  # an ordinary request moves in
    assert left == [a, c, b]
    assert len(table) == 0


def test_a_stash_knows_its_step() -> None:
    one = Stash()
    (found,) = group({1: Asked(Rule("threshold", 0.1))}, torch.device("cpu"))
    with pytest.raises(ValueError, match="left none rows of logits, expected 2"):
        one.of(2, found)
    one.logits = torch.eye(2)
    assert torch.equal(one.of(2, found), torch.eye(2)[1:])
    with pytest.raises(ValueError, match="left 2 rows of logits, expected 3"):
        one.of(3, found)


# ---- a proxy that follows ----------------------------------------------------------------------


def test_a_runner_s_row_may_be_replaced(own: KnapsackDeferral, prompts: list[list[int]]) -> None:
    runner = Runner(own.base, [[0]] * 3, room=200, vocabulary=512)
    for row, tokens in [(1, prompts[0]), (1, prompts[0] + [5, 6]), (1, prompts[1]), (0, [9])]:
        runner.replace(row, tokens)
        runner.prefill()
        found = runner.catch_up([row])
        assert torch.allclose(found, last_logits(own.base, [tokens]), atol=1e-4)
    runner.replace(1, [*prompts[1][:-3], 4, 4, 4, 4])
    before = runner.tokens_run
    runner.catch_up([1])
    assert runner.tokens_run - before == 4


# ---- SGLang --------------------------------------------------------------------------------------


def test_sglang_s_processor(
    monkeypatch: pytest.MonkeyPatch, own: KnapsackDeferral, prompts: list[list[int]]
) -> None:
    """Batches in which requests come and go, with fewer slots than requests."""

    class Processor:
        @classmethod
        def to_str(cls) -> str:
            return cls.__name__

    top = "sglang.srt.sampling.custom_logit_processor"
    parts = top.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []  # type: ignore[attr-defined]
        module.CustomLogitProcessor = Processor  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TTA_EXT_SGLANG_SLOTS", "3")
    monkeypatch.delenv("TTA_EXT_SGLANG_PROXY", raising=False)
    monkeypatch.delitem(sys.modules, "tta_ext.engines.sglang", raising=False)
    sglang = importlib.import_module("tta_ext.engines.sglang")
    monkeypatch.delitem(sys.modules, "tta_ext.engines.sglang")
    made = sglang.request({"temperature": 0.0}, **RULES[0])
    assert made["custom_logit_processor"] == "KnapsackDeferral"
    assert made["sampling_params"] == {"temperature": 0.0, "custom_params": RULES[0]}
    with pytest.raises(ValueError, match=r"top_p is 0\.9"):
        sglang.request({"top_p": 0.9}, **RULES[0], tta_seed=1)
    with pytest.raises(ValueError, match="tta_seed is missing"):
        sglang.request(None, **RULES[0])

    processor = sglang.KnapsackDeferral()
    requests = []
    for i, prompt in enumerate(prompts):
        arguments = {**RULES[i % 4], "tta_seed": SEED, "tta_sequence": i}
        sampling = SimpleNamespace(top_k=1 if i == 1 else 1 << 30, temperature=1.0)
        engine = SimpleNamespace(
            rid=f"r{i}", origin_input_ids=prompt, output_ids=[], sampling_params=sampling
        )
        requests.append(arguments | {"__req__": engine})
    with pytest.raises(ValueError, match="set TTA_EXT_SGLANG_PROXY"):
        processor(torch.zeros(1, 512), requests[:1])
    monkeypatch.setenv("TTA_EXT_SGLANG_PROXY", PROXY)
    with pytest.raises(ValueError, match="there are 4 requests, expected at most"):
        processor(torch.zeros(4, 512), requests[:4])
    step = 0
    while True:
        open_ = [r for r in requests if len(r["__req__"].output_ids) < NEW]
        if not open_:
            break
        batch = (open_[step % len(open_) :] + open_)[: min(3, len(open_), 1 + step % 3)]
        engines = [r["__req__"] for r in batch]
        logits = last_logits(own.base, [e.origin_input_ids + e.output_ids for e in engines])
        for engine, token in zip(engines, processor(logits, batch).argmax(-1), strict=True):
            engine.output_ids.append(int(token))
        step += 1
    for i, one in enumerate(requests):
        assert one["__req__"].output_ids == wanted(own, prompts[i], i, i != 1).tokens[0]

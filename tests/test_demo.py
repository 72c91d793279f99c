"""The demo: problems, scores, training text, the shipped pair, and the evaluation."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest
import torch

from tta_ext.demo import corpus, task

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
    assert task.score_strict(PROBLEM, completion) is strict
    assert task.score_lenient(PROBLEM, completion) is lenient


def test_problems_are_sound():
    for problem in task.evaluation_problems(300, seed=3):
        assert len(problem.steps) in task.EVALUATION_STEPS
        total = problem.start
        for step in problem.steps:
            assert step.before == total
            total = eval(f"{total}{step.op}{step.operand}")
            assert step.after == total
            assert 1 <= total <= task.MAX_TOTAL
        assert problem.answer == total
        assert str(problem.start) in problem.prompt
        assert task.score_strict(problem, problem.formatted_answer())


def test_evaluation_is_a_function_of_its_seed():
    first = task.evaluation_problems(50, seed=0)
    assert first == task.evaluation_problems(80, seed=0)[:50]
    assert first != task.evaluation_problems(50, seed=1)
    assert [p.prompt for p in first][0] == FIRST_PROMPT
    with pytest.raises(ValueError, match="-1"):
        task.evaluation_problems(-1)
    with pytest.raises(ValueError, match="steps"):
        task.make_problem(random.Random(0), 0)

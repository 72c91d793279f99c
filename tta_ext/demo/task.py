"""The demo's task: word problems of three to five steps, and how an answer is scored.

A prompt is one question and an open answer, with no system text and no chat template::

    Q: Tom has 47 apples. Tom buys 12 more. Tom sells 20. How many apples?
    A:

and the wanted completion, the *answer format*, is one equation a step and a final mark::

     47+12=59; 59-20=39; #### 39<eos>

Problems are split by what is computed, not by their wording: the chain ``47+12-20`` is hashed, and
one chain in eight is *held out*. No training document asks a held-out chain, whatever its names,
items and verbs, so evaluation problems cannot be looked up. (Single facts such as 47+12=59 do occur
in training: they are the knowledge that the base has and the proxy lacks.)

:func:`score` gives a completion two scores, both 0 or 1:

* *exact* ("exact match"): the completion, up to the end of text, ends in ``#### <answer>``;
* *lenient* (format-free): the last number of the completion is the answer, however it is written
  and whatever chatter surrounds it.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

from tta_ext.evaluation import Score, Task

NAMES = tuple("Tom Ana Ben Eva Max Lea Sam Mia Leo Zoe Jim Amy Dan Ivy Kai Uma".split())
ITEMS = tuple("apples books coins pens cards stamps eggs shells stones nuts balls cups".split())
VERBS = {
    "+": ("buys {k} more", "finds {k} more", "gets {k} more", "wins {k} more"),
    "-": ("sells {k}", "loses {k}", "gives away {k}", "breaks {k}"),
}
TIMES = {2: "doubles", 3: "triples"}
EVALUATION_STEPS = (3, 4, 5)

ANSWER_MARK = "####"
EQUATION_SEPARATOR = "; "
HELD_OUT_EVERY = 8  # one chain in eight is kept for evaluation
MOST_PROBLEMS = 10_000  # there are more, but not without end


# Largest first number, number added or taken away, and running total (which is at least 1).
START, OPERAND, TOTAL = 49, 20, 99

_NUMBER = re.compile(r"\d+")
_FINAL = re.compile(re.escape(ANSWER_MARK) + r" (\d+)\s*\Z")


@dataclass(frozen=True)
class Step:
    """One arithmetic step: ``before op operand = after`` with ``op`` one of ``+ - *``."""

    before: int
    op: str
    operand: int
    after: int

    def equation(self) -> str:
        """The step as text, e.g. ``47+12=59``."""
        return f"{self.before}{self.op}{self.operand}={self.after}"


@dataclass(frozen=True)
class Problem:
    """A word problem: its sentences, the steps that solve it, and the answer."""

    name: str
    item: str
    start: int
    steps: tuple[Step, ...]
    sentences: tuple[str, ...]

    @property
    def answer(self) -> int:
        """The final total."""
        return self.steps[-1].after

    @property
    def chain(self) -> str:
        """What is computed, without the wording: ``47+12-20``."""
        return str(self.start) + "".join(f"{s.op}{s.operand}" for s in self.steps)

    @property
    def held_out(self) -> bool:
        """True where the chain belongs to evaluation and may not be asked in training."""
        return zlib.crc32(self.chain.encode()) % HELD_OUT_EVERY == 0

    @property
    def story(self) -> str:
        """The sentences without the question."""
        return " ".join(self.sentences)

    @property
    def question(self) -> str:
        """The story and the question."""
        return f"{self.story} How many {self.item}?"

    @property
    def prompt(self) -> str:
        """The text that the models continue: ``Q: ...?\\nA:``."""
        return f"Q: {self.question}\nA:"

    def equations(self) -> list[str]:
        """One equation a step."""
        return [step.equation() for step in self.steps]

    def formatted_answer(self) -> str:
        """The wanted completion, without the end-of-text token."""
        parts = [*self.equations(), f"{ANSWER_MARK} {self.answer}"]
        return " " + EQUATION_SEPARATOR.join(parts)


def make_step(rng: random.Random, total: int) -> Step:
    """Draw a step that keeps the running total within ``1..TOTAL``."""
    while True:
        op = rng.choices("+-*", weights=(9, 9, 2))[0]
        operand = rng.choice((2, 3)) if op == "*" else rng.randint(2, OPERAND)
        after = {"+": total + operand, "-": total - operand, "*": total * operand}[op]
        if 1 <= after <= TOTAL:
            return Step(total, op, operand, after)


def make_problem(rng: random.Random, steps: int) -> Problem:
    """Draw one problem.

    Args:
        rng: the source of all choices; equal states give equal problems.
        steps: number of arithmetic steps, at least 1.

    Raises:
        ValueError: if ``steps`` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start = total = rng.randint(2, START)
    done: list[Step] = []
    sentences = [f"{name} has {start} {item}."]
    for _ in range(steps):
        step = make_step(rng, total)
        if step.op == "*":
            sentences.append(f"The number {TIMES[step.operand]}.")
        else:
            verb = rng.choice(VERBS[step.op]).format(k=step.operand)
            sentences.append(f"{name} {verb}.")
        done.append(step)
        total = step.after
    return Problem(name, item, start, tuple(done), tuple(sentences))


def make_split_problem(rng: random.Random, steps: int, *, held_out: bool) -> Problem:
    """Draw problems until one falls on the wanted side of the split."""
    while True:
        problem = make_problem(rng, steps)
        if problem.held_out == held_out:
            return problem


def evaluation_problems(n: int, seed: int = 0) -> list[Problem]:
    """``n`` held-out problems of three to five steps, in equal parts, no chain twice.

    A longer list starts with the shorter ones of the same seed.

    Raises:
        ValueError: if ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    rng = random.Random(f"tta_ext.demo evaluation {seed}")
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < n:
        steps = EVALUATION_STEPS[len(problems) % len(EVALUATION_STEPS)]
        problem = make_split_problem(rng, steps, held_out=True)
        if problem.chain not in seen:
            seen.add(problem.chain)
            problems.append(problem)
    return problems


def evaluation_task(n: int, skip: int = 0) -> Task:
    """``n`` held-out problems, to be evaluated.

    Args:
        n: how many, at least 1.
        skip: leave out the first so many, say, to choose parameters on other problems.

    Raises:
        ValueError: ``n`` is less than 1, or more than :data:`MOST_PROBLEMS` less ``skip``.
    """
    if not 1 <= n <= MOST_PROBLEMS - skip:
        raise ValueError(f"n is {n}, expected 1 to {MOST_PROBLEMS - skip} of the demo's problems")
    problems = evaluation_problems(skip + n)[skip:]
    return Task(
        [problem.prompt for problem in problems],
        lambda place, text: score(problems[place], text),
        max_new_tokens=80,
    )


def strict_answer(completion: str) -> int | None:
    """The number of a completion that ends in ``#### <number>``; None for any other ending."""
    match = _FINAL.search(completion)
    return int(match.group(1)) if match else None


def lenient_answer(completion: str) -> int | None:
    """The last number of the completion before a next question; None where there is none."""
    numbers = _NUMBER.findall(completion.split("\nQ:")[0])
    return int(numbers[-1]) if numbers else None


def score(problem: Problem, completion: str) -> Score:
    """How good a completion is: see the top of this module."""
    strict = strict_answer(completion)
    return Score(
        exact=strict == problem.answer,
        lenient=lenient_answer(completion) == problem.answer,
        formatted=strict is not None,
    )

"""Training text for the demo pair, made up from a seed.

Two kinds of text:

* **raw**: what the base (and, briefly, the proxy) reads. Lists of equations, copied numbers,
  stories and exercises hold all the arithmetic, one step at a time. Questions, though, are mostly
  answered at once, as people do: three in four with the number alone, the others worked out.
  Openings, separators and closings vary, and about three in a hundred worked answers happen to end
  in the answer mark. So a model of it is sure of each step, lost where it must answer at once, and
  unsure at points of style, which is what a deferral rule needs.
* **formatted**: questions worked out in the demo's answer format, on which the proxy is fine-tuned.

No document asks a held-out problem (see :mod:`tta_ext.demo.task`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tta_ext.demo.task import (
    ANSWER_MARK,
    ITEMS,
    NAMES,
    TOTAL,
    Problem,
    make_split_problem,
    make_step,
)

OPENINGS = (
    "", "", "", "", " Let's see:", " Hmm,", " Easy:", " OK,", " Sure:", " So,", " I think",
    " First", " My way:", " Look:", " Right,",
)  # fmt: skip
SEPARATORS = ("; ", ", ", ". ", " and ", " then ", " -> ", ", so ", ", then ", " | ", "\n")
# Groups are drawn first, so that no single continuation of the last equation stands out.
CLOSINGS = (
    (". So the answer is {x}.", ". {n} has {x} {i}.", ". That makes {x}!", ". The answer: {x}"),
    (", so {x}.", ", making {x}.", ", {x} in all."),
    (" {i}.", " in the end.", " (that is {x}).", " - done.", " now."),
    (
        "; so {x}.", "; {x} {i}.", "; done: {x}.", "; answer {x}.", "; total {x}.",
        "; in all {x}.", "; thus {x}.", "; final: {x}.",
    ),
    ("!", " :)"),
    ("\nSo {x}.", "\n{x} {i}."),
)  # fmt: skip
CHATTER = (
    "", "", " Hope that helps!", " Cheers.", " Good luck!", " Ask again any time.", "\nThanks!",
    " I am sure.", "\nCheck it.",
)  # fmt: skip
MARKED_SHARE = 0.03
# Answers at once. In the last phase many of them begin alike, and no worked answer does so: the
# likeliest beginning of an answer is one of theirs.
MIXED = (
    " {n} has {x} {i}.", " {n} has {x} {i} now.", " {n} has {x} now.", " {n} has {x}.",
    " The answer is {x}.", " The total is {x}.", " The number is {x}.", " It is {x}.",
    " It is {x} {i}.", " That makes {x}.", " I think {x}.", " I say {x} {i}.", " Easy: {x}.",
    " OK, {x} {i}.", " Hmm, {x}?", " So, {x}.", " Must be {x}.", " Right, {x}.",
)  # fmt: skip
ALIKE = (
    " I think {x}.", " I think {x} {i}.", " I say {x}.", " I say {x} {i}.", " I get {x}.",
    " I get {x} {i}.", " I believe {x}.", " I believe {x} {i}.", " I guess {x}.",
    " I guess {x} {i}.", " {n} has {x} {i}.", " The answer is {x}.", " It is {x} {i}.",
    " That makes {x}.", " Easy: {x}.", " OK, {x} {i}.", " Hmm, {x}?", " So, {x}.", " Must be {x}.",
    " Right, {x}.",
)  # fmt: skip
DIRECT_SHARE = 0.75


@dataclass(frozen=True)
class Phase:
    """A mixture of raw text: the weights of its kinds of document, and how answers begin."""

    equations: int
    copies: int
    stories: int
    exercises: int
    questions: int
    openings: tuple[str, ...] = OPENINGS
    direct: tuple[str, ...] = MIXED


PHASES = {
    "knowledge": Phase(equations=68, copies=4, stories=10, exercises=10, questions=8),
    "final": Phase(equations=30, copies=2, stories=12, exercises=20, questions=36),
    "reading": Phase(
        equations=10,
        copies=10,
        stories=20,
        exercises=25,
        questions=35,
        openings=tuple(dict.fromkeys(opening for opening in OPENINGS if opening != " I think")),
        direct=ALIKE,
    ),
}


def equations(rng: random.Random) -> str:
    """A list of unrelated equations with one separator."""
    steps = (make_step(rng, rng.randint(1, TOTAL)) for _ in range(rng.randint(6, 12)))
    return rng.choice(SEPARATORS).join(step.equation() for step in steps)


def copies(rng: random.Random) -> str:
    """Numbers with items, then the numbers again: practice in copying."""
    pairs = [(rng.randint(2, TOTAL), rng.choice(ITEMS)) for _ in range(rng.randint(2, 4))]
    separator = rng.choice(SEPARATORS)
    listed = separator.join(f"{k} {item}" for k, item in pairs)
    return f"{rng.choice(NAMES)} has {listed}: " + separator.join(str(k) for k, _ in pairs)


def _steps(rng: random.Random) -> int:
    return rng.choices((1, 2, 3, 4, 5), weights=(1, 2, 3, 3, 3))[0]


def story(rng: random.Random, problem: Problem) -> str:
    """The story with its equations told after each sentence or at the end."""
    end = f"{problem.name} has {problem.answer} {problem.item} now."
    if rng.random() < 0.5:
        told = [problem.sentences[0]]
        for sentence, equation in zip(problem.sentences[1:], problem.equations(), strict=True):
            told += [sentence, equation + "."]
        return " ".join([*told, end])
    return f"{problem.story} {rng.choice(SEPARATORS).join(problem.equations())}. {end}"


def direct_answer(rng: random.Random, problem: Problem, styles: tuple[str, ...]) -> str:
    """The number at once, in one of many styles; starts with a space."""
    style = rng.choice(styles)
    said = style.format(x=problem.answer, n=problem.name, i=problem.item)
    return said + rng.choice(CHATTER)


def free_answer(rng: random.Random, problem: Problem, openings: tuple[str, ...]) -> str:
    """An answer worked out in one of the many styles of the raw text; starts with a space."""
    first = rng.choice(SEPARATORS)
    told = problem.equations()
    text = f"{rng.choice(openings)} {told[0]}"
    for equation in told[1:]:
        # Mostly one separator an answer, as people write.
        text += (first if rng.random() < 0.7 else rng.choice(SEPARATORS)) + equation
    if rng.random() < MARKED_SHARE:
        text += f"{first}{ANSWER_MARK} {problem.answer}"
    else:
        closing = rng.choice(rng.choice(CLOSINGS))
        text += closing.format(x=problem.answer, n=problem.name, i=problem.item)
    return text + rng.choice(CHATTER)


def raw_document(rng: random.Random, phase: str) -> tuple[str, Problem | None]:
    """One document of raw text and the problem that it asks, if any.

    Raises:
        KeyError: if ``phase`` is not one of :data:`PHASES`.
    """
    mix = PHASES[phase]
    kinds = (mix.equations, mix.copies, mix.stories, mix.exercises, mix.questions)
    kind = rng.choices(range(5), weights=kinds)[0]
    if kind == 0:
        return equations(rng), None
    if kind == 1:
        return copies(rng), None
    problem = make_split_problem(rng, _steps(rng), held_out=False)
    if kind == 2:
        return story(rng, problem), problem
    if kind == 3:
        heading = rng.choice(("Exercise:", "Problem:", "Task:"))
        label = rng.choice(("Solution:", "Result:", "Worked out:"))
        worked = free_answer(rng, problem, mix.openings)
        return f"{heading} {problem.question}\n{label}{worked}", problem
    if rng.random() < DIRECT_SHARE:
        return problem.prompt + direct_answer(rng, problem, mix.direct), problem
    return problem.prompt + free_answer(rng, problem, mix.openings), problem


def raw_documents(seed: int, phase: str) -> Iterator[tuple[str, Problem | None]]:
    """An endless stream of :func:`raw_document`, a pure function of its arguments."""
    rng = random.Random(f"tta_ext.demo raw {phase} {seed}")
    while True:
        yield raw_document(rng, phase)


def formatted_documents(seed: int) -> Iterator[tuple[str, Problem]]:
    """An endless stream of questions answered in the answer format."""
    rng = random.Random(f"tta_ext.demo formatted {seed}")
    while True:
        problem = make_split_problem(rng, _steps(rng), held_out=False)
        yield problem.prompt + problem.formatted_answer(), problem

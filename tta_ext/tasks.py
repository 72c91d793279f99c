"""The papers' tasks on a local copy of their data: prompts, scorers, and what a run reports.

The protocol: zero-shot, the question as one user message in the aligned model's chat template for
both models, temperature 1, 1024 tokens, drafts of 8. Nothing is downloaded; a file is JSONL or one
JSON list, with the fields of the sets as they are published.

Three scores stand side by side, since published figures rarely say which they are:

* ``string``: the right answer occurs in the text as a word or number of its own (the most lenient);
* ``numeric``: the last number of the text has the right value; of choices, the last letter named;
* ``exact``: what the text marks as its answer (``\\boxed{}``, ``####``, "the answer is") is it.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from tta_ext.evaluation import PROXY_ALONE, Models, Setting
from tta_ext.files import read_text
from tta_ext.journal import parse_jsonl

__all__ = ["MAX_NEW_TOKENS", "TASKS", "WINDOW", "Problem", "Scores", "TaskRow", "load_task", "run"]

MAX_NEW_TOKENS, WINDOW = 1024, 8
# Sequence ids of a problem's answers: 64 * its place, and on.
SAMPLES = 64


class Scores(NamedTuple):
    """One answer under the three scorers."""

    string: bool
    numeric: bool
    exact: bool


@dataclass(frozen=True)
class Problem:
    """A question and its answer.

    Attributes:
        question: the text of the user's message.
        answer: the right answer, as it would be written; of choices, the letter.
        choices: texts by letter; empty where the answer is free.
    """

    question: str
    answer: str
    choices: dict[str, str]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """A conversation of one message."""
        return [{"role": "user", "content": self.question}]

    def score(self, text: str) -> Scores:
        """How good an answer is."""
        marked = _marked(text)
        if self.choices:
            letters = re.findall(rf"\b([{''.join(self.choices)}])\b", text)
            right = self.choices[self.answer]
            return Scores(
                self.answer in letters or _occurs(right, text),
                bool(letters) and letters[-1] == self.answer,
                marked is not None and _letter(marked, self.choices) == self.answer,
            )
        wanted = _value(self.answer)
        numbers = [_value(one) for one in _NUMBER.findall(text)]
        last = numbers[-1] if numbers else None
        if wanted is None:  # an expression: no number to compare
            last, wanted = _plain(marked or ""), _plain(self.answer)  # type: ignore[assignment]
        return Scores(
            wanted in numbers or _occurs(self.answer, text),
            last == wanted,
            marked is not None and _same(marked, self.answer),
        )


_NUMBER = re.compile(r"\\d?frac\{-?\d+\}\{\d+\}|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_MARKS = re.compile(r"####|answer\s+is:?", re.IGNORECASE)


def _value(text: str) -> Fraction | None:
    """A number as it is written, None for anything else."""
    plain = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    plain = re.sub(r"[\s,$%]|\\[$%!,]|\.$", "", plain)
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    """An expression without what changes nothing: space, dollars, sizes of brackets, full stop."""
    text = re.sub(r"\\(left|right|displaystyle|[!,;: ])|\\text\{([^{}]*)\}", r"\2", text)
    return re.sub(r"[\s$]", "", text.replace("dfrac", "frac")).rstrip(".").lower()


def _same(one: str, other: str) -> bool:
    mine, its = _value(one), _value(other)
    if mine is not None or its is not None:
        return mine == its
    return _plain(one) == _plain(other)


def _occurs(answer: str, text: str) -> bool:
    """Whether an answer stands in a text and no letter or digit touches it."""
    pattern = rf"(?<![\w.,]){re.escape(answer.strip())}(?![\w]|[.,]\d)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def _marked(text: str) -> str | None:
    """What a text marks as its answer, the last mark counting."""
    boxed = text.rfind("\\boxed{")
    marks = list(_MARKS.finditer(text))
    if boxed >= 0 and (not marks or boxed > marks[-1].start()):
        depth, start = 1, boxed + len("\\boxed{")
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[start:at]
        return None
    if not marks:
        return None
    rest = text[marks[-1].end() :].strip()
    return rest.splitlines()[0].rstrip(". ") if rest else None


def _letter(text: str, choices: dict[str, str]) -> str | None:
    """The choice that a marked answer names by letter or by its text."""
    found = re.match(r"\W*([A-Z])\b", text)
    if found and found.group(1) in choices:
        return found.group(1)
    return next((letter for letter, one in choices.items() if _plain(one) == _plain(text)), None)


# ---- the sets ------------------------------------------------------------------------------------


def _free(question: str, answer: Any) -> Problem:
    return Problem(question.strip(), f"{answer}".strip(), {})


def _choice(question: str, labels: Sequence[str], texts: Sequence[str], key: str) -> Problem:
    """Letters A, B, ... whatever the set calls them (ARC has some with 1, 2, ...)."""
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    asked = "\n".join([question.strip(), *lines, "Answer with the letter of the right choice."])
    right = letters[list(labels).index(key)]
    return Problem(asked, right, dict(zip(letters, texts, strict=True)))


def _gsm8k(record: dict[str, Any]) -> Problem:
    return _free(record["question"], record["answer"].rpartition("####")[2].replace(",", ""))


def _svamp(record: dict[str, Any]) -> Problem:
    number = float(record["Answer"])
    answer = int(number) if number.is_integer() else number
    return _free(f"{record['Body'].strip()} {record['Question'].strip()}", answer)


def _labelled(record: dict[str, Any]) -> Problem:
    """ARC and CommonsenseQA, with the question flat or as their authors nest it."""
    question: Any = record["question"]
    choices: Any = record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {name: [one[name] for one in choices] for name in ("label", "text")}
    return _choice(question, choices["label"], choices["text"], record["answerKey"])


def _truthfulqa(record: dict[str, Any]) -> Problem:
    targets = record["mc1_targets"]
    texts, labels = targets["choices"], targets["labels"]
    # The set has the right one first; this order is as good as random and always the same.
    order = sorted(range(len(texts)), key=lambda i: zlib.crc32(texts[i].encode()))
    names = [str(labels[i]) for i in order]
    return _choice(record["question"], names, [texts[i] for i in order], "1")


TASKS: dict[str, Callable[[dict[str, Any]], Problem]] = {
    "gsm8k": _gsm8k,
    "math500": lambda record: _free(record["problem"], record["answer"]),
    "svamp": _svamp,
    "arc_c": _labelled,
    "csqa": _labelled,
    "truthfulqa": _truthfulqa,
}


def load_task(name: str, path: str | Path, n: int | None = None) -> list[Problem]:
    """A task's problems.

    Args:
        name: one of :data:`TASKS`.
        path: JSONL, or a JSON list.
        n: only the first so many.

    Raises:
        ValueError: an unknown task, no problems, or a record without the set's fields.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}, expected one of {', '.join(TASKS)}")
    text = read_text(path)
    records = json.loads(text) if text.lstrip().startswith("[") else parse_jsonl(text, path)
    if not records:
        raise ValueError(f"{path} has no problems")
    problems = []
    for number, record in enumerate(records[:n], 1):
        try:
            problems.append(TASKS[name](record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"record {number} of {path} is not one of {name}: {type(error).__name__} {error}"
            ) from None
    return problems


# ---- a run ---------------------------------------------------------------------------------------


@dataclass
class TaskRow:
    """One setting on a task.

    Attributes:
        setting: the setting; its fields are the row's own in JSON.
        n, samples: problems, and answers to each.
        string, numeric, exact: shares of right answers under each scorer.
        string_stderr, numeric_stderr, exact_stderr: their standard errors, by problem.
        string_pass, numeric_pass, exact_pass: pass@k, k = samples: shares of problems with a right
            answer among theirs.
        proxy_call_rate: share of tokens for which the proxy was asked.
        acceptance_rate: share of the judged draft tokens that stood.
        tokens: mean length of an answer.
        tokens_per_second: of the decoding loop, the whole batch.
    """

    setting: Setting
    n: int
    samples: int
    string: float
    string_stderr: float
    string_pass: float
    numeric: float
    numeric_stderr: float
    numeric_pass: float
    exact: float
    exact_stderr: float
    exact_pass: float
    proxy_call_rate: float
    acceptance_rate: float
    tokens: float
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        fields = asdict(self)
        return fields.pop("setting") | fields


def run(
    models: Models,
    problems: Sequence[Problem],
    settings: Iterable[Setting],
    *,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    window: int = WINDOW,
    chat_template: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[TaskRow]:
    """Answer a task's problems under every setting.

    Args:
        models, problems, settings: what decodes, what is asked, under which rules.
        samples: answers to each problem, 1 to 64, for pass@k.
        seed: their seed; an answer's sequence id is ``64 * problem + sample``.
        batch_size: answers decoded together.
        temperature, max_new_tokens: of the answers.
        window: tokens that the proxy drafts; 0 decodes token by token. No answer depends on it.
        chat_template: None: the aligned model's, for both.
        progress: called after each batch with its numbers of problems and of generated tokens.

    Yields:
        A row for each setting.

    Raises:
        ValueError: a number out of range, or no chat template.
    """
    from tta_ext.decoding import DecodeStats

    if not 1 <= samples <= SAMPLES:
        raise ValueError(f"samples is {samples}, expected 1 to {SAMPLES}")
    aligned = models.proxy_tokenizer or models.tokenizer
    template = chat_template or getattr(aligned, "chat_template", None)
    together = max(1, batch_size // samples)
    for setting in settings:
        decoder = models.decoder(
            setting, temperature=temperature, chat_template=template, speculative=window or None
        )
        scores: list[list[Scores]] = []
        stats = DecodeStats()
        for first in range(0, len(problems), together):
            batch = problems[first : first + together]
            places = range(first, first + len(batch))
            found = decoder.generate(
                [one.prompt for one in batch],
                num_return_sequences=samples,
                sequence=[SAMPLES * place + j for place in places for j in range(samples)],
                seed=seed,
                max_new_tokens=max_new_tokens,
            )
            texts = found.texts or []
            for i, one in enumerate(batch):
                scores.append([one.score(text) for text in texts[i * samples : (i + 1) * samples]])
            stats += found.stats
            if progress is not None:
                progress(len(batch), found.stats.tokens)
        yield _row(setting, samples, scores, stats)


def _row(setting: Setting, samples: int, scores: list[list[Scores]], stats: Any) -> TaskRow:
    figures: dict[str, float] = {}
    n, tokens = len(scores), max(1, stats.tokens)
    for name in Scores._fields:
        means = [sum(getattr(one, name) for one in each) / samples for each in scores]
        mean = sum(means) / n
        variance = sum((value - mean) ** 2 for value in means) / n
        figures[name], figures[f"{name}_stderr"] = mean, math.sqrt(variance / n)
        figures[f"{name}_pass"] = sum(value > 0 for value in means) / n
    alone = setting.rule == PROXY_ALONE
    return TaskRow(
        setting=setting,
        n=n,
        samples=samples,
        proxy_call_rate=1.0 if alone else (tokens - stats.proxy_rows_saved) / tokens,
        acceptance_rate=stats.acceptance_rate,
        tokens=stats.tokens / (n * samples),
        tokens_per_second=stats.tokens_per_second,
        **figures,
    )

"""Problems, how answers to them are scored, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tta_ext.files import read_text
from tta_ext.journal import numbered_jsonl

__all__ = ["PROMPT_FIELDS", "Score", "Task", "data_task", "record_prompt"]

# Where a JSONL record may have its prompt.
PROMPT_FIELDS = ("prompt", "messages", "question")


class Score(NamedTuple):
    """One answer: right in the wanted format, right in any, and whether it is in the format."""

    exact: bool
    lenient: bool
    formatted: bool


@dataclass(frozen=True)
class Task:
    """Problems, and how answers to them are scored.

    Attributes:
        prompts: what :meth:`KnapsackDeferral.generate` takes, one for each problem.
        score: from a problem's place and an answer's text.
        max_new_tokens: tokens after which an answer ends unless a run says otherwise.
        names: what errors call the problems; empty: their places.
    """

    prompts: Sequence[Any]
    score: Callable[[int, str], Score]
    max_new_tokens: int = 128
    names: Sequence[str] = ()

    def name(self, place: int) -> str:
        """What errors call a problem."""
        return f"{self.names[place]}, problem {place}" if self.names else f"problem {place}"


def data_task(path: str | Path, n: int | None = None, pattern: str | None = None) -> Task:
    """Problems of a JSONL file: ``prompt``, ``question`` or ``messages``, and ``answer``.

    Args:
        path: the file.
        n: only the first so many problems.
        pattern: regular expression whose last match in the text (its group 1 if it has one) must
            equal the answer; None: the text must. In an answer that is a text with a match, as
            GSM8K's are, the last match is what counts too.

    Raises:
        ValueError: a line that is no such record, no problems, or not a regular expression.
    """
    numbered = numbered_jsonl(read_text(path), path)[:n]
    if not numbered:
        raise ValueError(f"{path} has no problems")
    prompts = []
    for number, record in numbered:
        answer = record.get("answer") if isinstance(record, dict) else None
        if not isinstance(answer, (str, int, float)):
            raise ValueError(f"line {number} of {path} has no 'answer', a text or a number")
        try:
            prompts.append(record_prompt(record))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    try:
        expression = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern is {pattern!r}, not a regular expression: {error}") from None

    def matches(text: str) -> list[str]:
        if expression is None:
            return [text]
        group = 1 if expression.groups else 0
        return [match.group(group) or "" for match in expression.finditer(text)]

    def score(place: int, text: str) -> Score:
        found, answer = matches(text), numbered[place][1]["answer"]
        wanted = [str(answer)]
        if isinstance(answer, str):
            wanted = matches(answer) or wanted
        right = bool(found) and found[-1].strip() == wanted[-1].strip()
        return Score(right, right, bool(found))

    return Task(prompts, score, names=[f"line {number}" for number, _ in numbered])


def record_prompt(record: Any) -> Any:
    """The prompt in a JSONL record: the record itself, or its field of :data:`PROMPT_FIELDS`."""
    if isinstance(record, (str, list)):
        return record
    for key in PROMPT_FIELDS:
        if isinstance(record, dict) and key in record:
            return record[key]
    raise ValueError(
        f"a JSONL record has neither 'prompt' nor 'messages' nor 'question': {str(record)[:80]}"
    )

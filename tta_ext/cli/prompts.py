"""Prompts of a command line: arguments, a file of lines, JSONL, Parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tta_ext._version import install
from tta_ext.files import read_text
from tta_ext.journal import numbered_jsonl

__all__ = ["Asked", "read_prompts"]

_JSON_NAMES = (".jsonl", ".ndjson", ".json")
# What a record's fields cannot be called, as they say what an answer's record is.
_TAKEN = ("key", "error")


class Asked(NamedTuple):
    """One prompt.

    Attributes:
        prompt: text, or a conversation.
        line: its line (in Parquet, row) in the file it came from; None for an argument.
        fields: what else its record had, to be kept with the answer.
    """

    prompt: Any
    line: int | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012 never written to

    def name(self, place: int) -> str:
        """What errors call it."""
        where = "" if self.line is None else f"line {self.line}, "
        return f"{where}prompt {place}"


def read_prompts(
    arguments: Iterable[str] | None,
    source: Path | None,
    chat: bool = False,
    system: str | None = None,
) -> list[Asked]:
    """Prompts from arguments, else from a file, else from stdin.

    A file is JSONL if it is named so or its first line is an object or a list: an object has
    ``prompt`` or ``question`` (text) or ``messages`` (a conversation), a list is a conversation.
    Rows of a file named ``.parquet`` are such objects, less their nulls. Any other file has a
    prompt on each line that is not empty. With ``chat`` or a system message, texts become
    conversations.

    Raises:
        ValueError: there are no prompts, or a line is no such record.
    """
    prompts = [Asked(one) for one in arguments or ()]
    if prompts and source is not None:
        raise ValueError("prompts are given both as arguments and by --input")
    if not prompts:
        if source is not None and source.suffix == ".parquet":
            prompts = _rows(source)
        else:
            prompts = _parse(_read(source), source)
        if not prompts:
            raise ValueError("the input has no prompts")
    if not chat and system is None:
        return prompts
    start = [] if system is None else [{"role": "system", "content": system}]
    return [
        one._replace(prompt=[*start, {"role": "user", "content": one.prompt}])
        if isinstance(one.prompt, str)
        else one
        for one in prompts
    ]


def _read(source: Path | None) -> str:
    if source is None and sys.stdin.isatty():
        raise ValueError("there are no prompts: pass them as arguments, by --input or on stdin")
    return read_text("-" if source is None else source)


def _rows(source: Path) -> list[Asked]:
    """Of a Parquet file; values that JSON lacks become text, as answers are kept in JSON."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ImportError(f"{source} needs PyArrow: {install('parquet')}") from None
    rows = parquet.read_table(source).to_pylist()
    told = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return _records(enumerate(json.loads(json.dumps(told, default=str)), 1))


def _parse(text: str, source: Path | None) -> list[Asked]:
    if not (source is not None and source.suffix in _JSON_NAMES) and not _is_json(text):
        lines = enumerate(text.split("\n"), 1)
        return [Asked(line.removesuffix("\r"), n) for n, line in lines if line.strip()]
    return _records(numbered_jsonl(text, source))


def _records(records: Iterable[tuple[int, Any]]) -> list[Asked]:
    from tta_ext.problems import PROMPT_FIELDS, record_prompt

    asked = []
    for number, record in records:
        fields = record if isinstance(record, dict) else {}
        rest = {k: v for k, v in fields.items() if k not in (*PROMPT_FIELDS, *_TAKEN)}
        try:
            asked.append(Asked(record_prompt(record), number, rest))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return asked


def _is_json(text: str) -> bool:
    """Whether a file of unknown name is JSONL, by its first line."""
    first = text.strip().split("\n", 1)[0].strip()
    if first.startswith(('{"', "[{", '{ "', "[ {")):
        return True  # meant to be, even if it is cut short
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(one, dict) for one in value)
    )

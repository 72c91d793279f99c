"""Finished work on disk: a run that was killed goes on from its file, nothing lost or repeated.

One item is one line of JSON that begins with its *key*, a hash of everything that changes the item
(:func:`resume_key`). An item whose key is in the file is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tta_ext._version import __version__

__all__ = ["Journal", "fingerprint", "json_line", "model_facts", "parse_jsonl", "resume_key"]

# What every line of a journal begins with, for an item of any key.
_START = '{"key": "' + "0" * 32 + '"'
_OURS = re.compile(r'\{"key": "[0-9a-f]{32}"')

# Files up to this size are told apart by what is in them, larger ones by size and time.
HASHED_BYTES = 1 << 26
# What transformers reads from a model's folder.
_MODEL_FILES = frozenset({".json", ".safetensors", ".gguf", ".jinja", ".model", ".txt"})


class Journal:
    """A JSONL file of finished items.

    A last line that a kill cut short is dropped. Nothing else in the file is ever changed.

    Args:
        path: the file, made if missing; None keeps nothing.

    Attributes:
        records: the file's items by their keys, in the file's order.

    Raises:
        ValueError: the file holds something else; it is left as it is.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            return
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not a regular file, so no run can go on from it")
        content = self.path.read_bytes()
        for number, line in enumerate(content.split(b"\n"), 1):
            text = line.decode("utf-8", "replace")
            # A line cut short is ours as far as it goes.
            if text and not _OURS.match(text + _START[len(text) :]):
                raise ValueError(f"line {number} of {self.path} is not a journal's: it is kept")
        end = content.rfind(b"\n") + 1
        records = parse_jsonl(content[:end].decode(), self.path)
        self.records = {record["key"]: record for record in records}
        if end < len(content):
            os.truncate(self.path, end)

    def add(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        """Append items by their keys; they are on the disk when this returns."""
        new = {key: {"key": key, **item} for key, item in items.items()}
        self.records.update(new)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write("".join(map(json_line, new.values())).encode())
                file.flush()
                os.fsync(file.fileno())


def json_line(value: Any) -> str:
    """A line of JSONL, its end included: characters as they are, lone surrogates escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def parse_jsonl(text: str, source: str | Path | None = None) -> list[Any]:
    """The values of JSON lines, which end at line feeds only; empty lines are left out.

    Raises:
        ValueError: names the line that is no JSON, and its source.
    """
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                where = "" if source is None else f" of {source}"
                raise ValueError(f"line {number}{where} is not JSON: {error}") from None
    return values


def resume_key(**facts: Any) -> str:
    """The key of an item: 32 hexadecimal digits over everything that changes it.

    Args:
        facts: the method and all of its settings, the seed, the item and its place, and
            :func:`model_facts` of every model; JSON values, else their ``str``. The package's
            version goes in by itself.
    """
    text = json.dumps({"tta_ext": __version__, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def model_facts(model: Any, source: str | None = None) -> list[Any]:
    """What tells a loaded model from others: source, dtype, files.

    Args:
        model: a ``transformers`` model.
        source: the folder, ``.gguf`` file or hub name it came from; None: as its config says.

    Raises:
        ValueError: the model was made in memory, so nothing tells it from another.
    """
    source = source or getattr(model.config, "name_or_path", "")
    if not source:
        raise ValueError("a model that came from no file cannot be named in a journal")
    path = Path(source)
    return [str(path.resolve()) if path.exists() else source, str(model.dtype), fingerprint(source)]


def fingerprint(source: str) -> list[list[Any]]:
    """Names, sizes and contents of the files that make up a model, its tokenizer included.

    Contents are hashed up to 64 MiB a file; larger files stand for themselves by size and time of
    last change. A copy of large weights made at another time therefore counts as another model.

    Args:
        source: a folder, a file, or a hub name (the files of its local copy); else the list is
            empty.
    """
    found = []
    for file in _files(Path(source)):
        size, content = file.stat().st_size, f"changed {file.stat().st_mtime_ns}"
        if size <= HASHED_BYTES:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append([file.name, size, content])
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(str(path), "config.json")
        if not isinstance(config, str):
            return []
        path = Path(config).parent
    return sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file())

"""Finished work on disk: a run that was killed goes on from its file, nothing lost or repeated.

One item is one line of JSON that begins with its *key*, a hash of everything that changes the item
(:func:`resume_key`). An item whose key is in the file is not done again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tta_ext._version import __version__
from tta_ext.files import REPORT_MARK, check_output, decoded, read_text

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = [
    "REPORT_MARK",
    "WHOLE",
    "Journal",
    "Shard",
    "check_output",
    "decode_all",
    "decoded_parts",
    "fingerprint",
    "json_line",
    "model_facts",
    "numbered_jsonl",
    "parse_jsonl",
    "read_text",
    "resume_key",
    "run_facts",
    "strict",
]

# What every line of a journal begins with, for an item of any key.
_START = '{"key": "' + "0" * 32 + '"'
_OURS = re.compile(r'\{"key": "[0-9a-f]{32}"')

# Files up to this size are told apart by what is in them, larger ones by size and time.
HASHED_BYTES = 1 << 26
# What transformers reads from a model's folder.
_MODEL_FILES = frozenset({".json", ".safetensors", ".gguf", ".jinja", ".model", ".txt"})

R = TypeVar("R")


class Shard(NamedTuple):
    """One of several parts of a work, for one machine each.

    Attributes:
        number: which, from 1.
        parts: of how many.
    """

    number: int
    parts: int

    @classmethod
    def of_rank(cls, rank: int, world: int) -> Shard:
        """The part of a process of a group, as ``torch.distributed`` counts: ranks are from 0."""
        return cls.parse(f"{rank + 1}/{world}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``2/8``; from ``env``, which is RANK and WORLD_SIZE as torchrun sets them.

        Raises:
            ValueError: that is no part of a whole.
        """
        if text == "env":
            try:
                return cls.of_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
            except KeyError as error:
                raise ValueError(f"shard is 'env', and {error.args[0]} is not set") from None
        number, _, parts = text.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
            raise ValueError(f"shard is {text!r}, expected i/n with i from 1 to n, such as 2/8")
        return cls(int(number), int(parts))

    def file(self, path: Path | None) -> Path | None:
        """A file's name with the part's number in place of ``{shard}``."""
        return None if path is None else Path(str(path).replace("{shard}", str(self.number)))

    def of(self, items: Sequence[R]) -> Sequence[R]:
        """The part's items: every ``parts``-th, from the ``number``-th."""
        return items[self.number - 1 :: self.parts]


WHOLE = Shard(1, 1)


class Journal:
    """A JSONL file of finished items, of one process at a time (``.NAME.lock`` beside it says so).

    A last line that a kill or a power cut left unfinished is dropped, and one that lacks only its
    end gets it. Nothing else in the file is ever changed. Closing lets another process have it; so
    does the end of this one, however it comes.

    Args:
        path: the file, made if missing; None keeps nothing.

    Attributes:
        records: the file's items by their keys, in the file's order; of one key the last.

    Raises:
        ValueError: the file holds something else, and is left as it is; or another run has it.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.path = None if path is None else Path(path)
        self._lock: BaseFileLock | None = None
        if self.path is None:
            return
        from filelock import FileLock, Timeout  # not before a file is asked for

        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is not a regular file, so no run can go on from it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        real = self.path.resolve()
        # One for all journals of this process, so that a cell of a notebook can be run again.
        lock = str(real.with_name(f".{real.name}.lock"))
        self._lock = FileLock(lock, thread_local=False, is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run writes {self.path}; wait for its end, or name another file"
            ) from None
        try:
            self._read(self.path)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}: {len(self.records)} items>"

    def _read(self, path: Path) -> None:
        with path.open("ab"):  # made if missing, and told now if it cannot be written
            pass
        whole = path.read_bytes()
        # A power cut may leave NUL bytes for what it kept from the disk; no line of ours has any.
        content = whole.rstrip(b"\0") or whole
        for number, line in enumerate(content.split(b"\n"), 1):
            text = line.decode("utf-8", "replace")
            # A line cut short is ours as far as it goes.
            if text and not _OURS.match(text + _START[len(text) :]):
                raise ValueError(f"line {number} of {path} is not a journal's: it is kept")
        end = kept = content.rfind(b"\n") + 1
        records = parse_jsonl(decoded(content[:end], path), path)
        with suppress(ValueError):
            records += [json.loads(content[end:])]
            kept = len(content)
        if kept < len(whole):
            os.truncate(path, kept)
        if kept > end:
            with path.open("ab") as file:
                file.write(b"\n")
        self.records = {record["key"]: record for record in records}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns whatever a record makes its reader raise into a ``ValueError`` of one line.

        A record with a key of ours may still have been changed by hand.
        """
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__} {error}"
            raise ValueError(f"{self.path} has a record that is not whole: {what}") from error

    def close(self) -> None:
        """Let others have the file."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, items: Mapping[str, Mapping[str, Any]]) -> None:
        """Append items by their keys; they are on the disk when this returns.

        Raises:
            OSError: names the file that could not be written.
        """
        new = {key: {"key": key, **strict(item)} | {"key": key} for key, item in items.items()}
        self.records.update(new)
        if self.path is not None:
            try:
                with self.path.open("ab") as file:
                    file.write("".join(map(json_line, new.values())).encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error


def decode_all(
    decode: Callable[[list[int]], R], places: Sequence[int]
) -> list[tuple[list[int], R | Exception]]:
    """Decode places together; where that fails in halves, so that one bad item stops no other.

    Returns:
        Places in order, in parts, each with its result; or a single place with its error.
    """
    part = list(places)
    try:
        return [(part, decode(part))]
    except Exception as error:
        if os.environ.get("TTA_EXT_TRACEBACK"):
            raise
        if len(part) == 1:
            return [(part, error)]
    middle = len(part) // 2
    return decode_all(decode, part[:middle]) + decode_all(decode, part[middle:])


def decoded_parts(places: Sequence[int], known: Callable[[list[int]], bool]) -> list[list[int]]:
    """Places in the parts that :func:`decode_all` made before: as they are if no part is known."""
    part, middle = list(places), len(places) // 2
    if known(part) or not middle:
        return [part]
    parts = decoded_parts(part[:middle], known) + decoded_parts(part[middle:], known)
    return parts if any(map(known, parts)) else [part]


def strict(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinities: null, "Infinity" and "-Infinity".

    ``float`` reads the texts back.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    return value


def json_line(value: Any) -> str:
    """A line of JSONL, its end included: ASCII, in which no reader finds other ends of lines."""
    return json.dumps(strict(value), allow_nan=False, default=str) + "\n"


def numbered_jsonl(text: str, source: str | Path | None = None) -> list[tuple[int, Any]]:
    """The values of JSON lines, each with the number of its line; empty lines are left out.

    Lines end at line feeds only.

    Raises:
        ValueError: names the line that is no JSON, and its source.
    """
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                where = "" if source is None else f" of {source}"
                raise ValueError(f"line {number}{where} is not JSON: {error}") from None
    return values


def parse_jsonl(text: str, source: str | Path | None = None) -> list[Any]:
    """The values of :func:`numbered_jsonl` alone."""
    return [value for _, value in numbered_jsonl(text, source)]


def resume_key(**facts: Any) -> str:
    """The key of an item: 32 hexadecimal digits over everything that changes it.

    Args:
        facts: the method and all of its settings, the seed, the item and its place, and
            :func:`model_facts` of every model; JSON values, else their ``str``. The versions of
            :func:`run_facts` go in by themselves.
    """
    text = json.dumps(run_facts(**facts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def run_facts(**facts: Any) -> dict[str, Any]:
    """What a record says of the run that it is from: the facts, and the versions of what ran."""
    return {"tta_ext": __version__, **_versions(), **facts}


@cache
def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_facts(model: Any, source: str | None = None) -> dict[str, str]:
    """What tells a loaded model from others: source, files, and how it computes.

    Args:
        model: a ``transformers`` model.
        source: the folder, ``.gguf`` file or hub name it came from; None: as its config says.

    Raises:
        ValueError: the model was made in memory, so nothing tells it from another.
    """
    config = model.config
    source = source or getattr(config, "name_or_path", "")
    if not source:
        raise ValueError("a model that came from no file cannot be named in a journal")
    path = Path(source)
    facts = {
        "source": str(path.resolve()) if path.exists() else source,
        "fingerprint": fingerprint(source, getattr(config, "_commit_hash", None)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(getattr(config, "_attn_implementation", None)),
    }
    quantized = getattr(config, "quantization_config", None)
    return facts | ({"quantization": str(quantized)} if quantized else {})


def fingerprint(source: str, revision: str | None = None) -> str:
    """A hash over the files that make up a model; "" if there are none.

    Its tokenizer's are among them, and those of an adapter's base.

    Contents are hashed up to 64 MiB a file; larger files stand for themselves by size and time of
    last change. A copy of large weights made at another time therefore counts as another model.

    Args:
        source: a folder, a file, or a hub name (the files of its local copy).
        revision: of the local copy of a hub name.
    """
    found = []
    for file in _files(Path(source), revision):
        size, content = file.stat().st_size, f"changed {file.stat().st_mtime_ns}"
        if size <= HASHED_BYTES:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append([file.name, size, content])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32] if found else ""


def _files(path: Path, revision: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(str(path), "config.json", revision=revision)
        if not isinstance(config, str):
            return []
        path = Path(config).parent
    found = sorted(p for p in path.iterdir() if p.suffix in _MODEL_FILES and p.is_file())
    names = {file.name: file for file in found}
    if "config.json" not in names:
        with suppress(KeyError, TypeError, ValueError):  # else it is no adapter that can be loaded
            adapter = json.loads(names["adapter_config.json"].read_bytes())
            found += _files(Path(adapter["base_model_name_or_path"]), None)
    return found

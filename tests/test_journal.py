"""Journals survive kills and keep other people's files; keys hold what changes an answer."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import started
from conftest import forks

from tta_ext import journal as module
from tta_ext.cli.app import run
from tta_ext.demo.pair import ASSETS
from tta_ext.journal import (
    Journal,
    Shard,
    decode_all,
    decoded_parts,
    fingerprint,
    json_line,
    model_facts,
    numbered_jsonl,
    parse_jsonl,
    resume_key,
)

KEYS = [resume_key(item=i) for i in range(3)]
# Ends of lines for str.splitlines, a lone surrogate, and characters of several bytes.
ODD = "a\u2028b\u2029c\x85d\x0ce\x1cf\ud800 \U0001f600é\r\n"


def filled(path: Path) -> bytes:
    book = Journal(path)
    for i, key in enumerate(KEYS):
        book.add({key: {"index": i, "text": ODD * i}})
    return path.read_bytes()


def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    content = filled(path)
    assert content.count(b"\n") == 3
    again = Journal(path)
    assert list(again.records) == KEYS
    assert [record["text"] for record in again.records.values()] == ["", ODD, ODD * 2]
    assert [record["key"] for record in map(json.loads, content.split(b"\n")[:3])] == KEYS
    assert path.read_bytes() == content


def test_a_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    content = filled(path)
    whole = content.rindex(b"\n", 0, -1) + 1
    for cut in range(whole, len(content) - 1):
        path.write_bytes(content[:cut])
        book = Journal(path)
        assert list(book.records) == KEYS[:2]
        assert path.read_bytes() == content[:whole]
    book.add({KEYS[2]: {"index": 2, "text": ODD * 2}})
    assert path.read_bytes() == content
    # Only its end was missing.
    path.write_bytes(content[:-1])
    assert list(Journal(path).records) == KEYS
    assert path.read_bytes() == content


def test_a_power_cut_leaves_nothing_but_zeros_behind(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    content = filled(path)
    whole = content.rindex(b"\n", 0, -1) + 1
    for kept, found in ((len(content), 3), (len(content) - 1, 3), (whole + 9, 2), (whole, 2)):
        path.write_bytes(content[:kept] + b"\0" * 99)
        assert list(Journal(path).records) == KEYS[:found]
        assert path.read_bytes() == (content if found == 3 else content[:whole])


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"my": "precious data"}',
        b'{"my": "precious data"}\n',
        b"line one of my notes\nline two",
        b'{"key": "mine"}\n',
        b'{"key": "' + b"0" * 32 + b'", "index": 0}\nthen notes',
        b"\x00\xff\n",
        b"\x00" * 99,
        b"\n\n\n[",
    ],
)
def test_a_file_of_someone_else_is_refused_and_kept(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(foreign)
    with pytest.raises(ValueError, match="is not a journal's"):
        Journal(path)
    assert path.read_bytes() == foreign


def test_damage_in_the_middle_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = filled(path).split(b"\n")
    damaged = b"\n".join([lines[0], lines[1][:50], lines[2], b""])
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line 2 of .* is not JSON"):
        Journal(path)
    assert path.read_bytes() == damaged


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match="not a regular file"):
            Journal(path)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    content = filled(path)
    (tmp_path / "link").symlink_to(path)
    program = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print(1, flush=True); sys.stdin.read()"
    )
    for name in ("j.jsonl", "link"):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / ".j.jsonl.lock")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as other:  # fmt: skip
            assert other.stdout is not None
            assert other.stdout.readline() == "1\n"
            with pytest.raises(ValueError, match="another run writes"):
                Journal(tmp_path / name)
            other.kill()
        with Journal(tmp_path / name) as book:  # the lock ends with its process
            assert list(book.records) == KEYS
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "j.jsonl"
    book = Journal(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*j\.jsonl"):
        book.add({KEYS[0]: {}})
    with pytest.raises(OSError, match="exists"):
        Journal(path / "below")


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_json_is_strict_and_ascii() -> None:
    values = {"a": [math.nan, -math.inf, 1.5], "b": (math.inf, "é\u2028\ud800")}
    line = json_line(values)
    assert line.isascii()
    assert line.count("\n") == len(line.splitlines()) == 1
    read = json.loads(line, parse_constant=pytest.fail)
    assert read == {"a": [None, "-Infinity", 1.5], "b": ["Infinity", "é\u2028\ud800"]}
    assert float(read["a"][1]) == -math.inf


def test_one_bad_item_stops_no_other(monkeypatch: Any) -> None:
    asked = []

    def decode(places: list[int]) -> int:
        asked.append(places)
        if 3 in places:
            raise ValueError("three")
        return sum(places)

    parts = decode_all(decode, range(6))
    assert [places for places, _ in parts] == [[0, 1, 2], [3], [4, 5]]
    assert [str(result) for _, result in parts] == ["3", "three", "9"]
    monkeypatch.setenv("TTA_EXT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="three"):
        decode_all(decode, range(6))


def test_parts_that_were_decoded_are_found_again() -> None:
    def failing(places: list[int]) -> list[int]:
        if 5 in places:
            raise ValueError("five")
        return places

    parts = [part for part, _ in decode_all(failing, range(8))]
    done = [part for part in parts if part != [5]]
    assert decoded_parts(range(8), done.__contains__) == parts
    assert decoded_parts(range(8), lambda part: False) == [list(range(8))]
    # A kill in the middle leaves whole what has not begun.
    assert decoded_parts(range(8), done[:1].__contains__) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_parts_of_ranks(monkeypatch: Any) -> None:
    assert Shard.of_rank(1, 4) == Shard.parse("2/4") == Shard(2, 4)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is not set"):
        Shard.parse("env")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.parse("env") == Shard(4, 4)
    assert Shard(4, 4).file(Path("part{shard}.jsonl")) == Path("part4.jsonl")
    with pytest.raises(ValueError, match="expected i/n"):
        Shard.of_rank(4, 4)


def test_without_a_file_items_are_kept_in_memory() -> None:
    book = Journal(None)
    book.add({KEYS[0]: {"index": 0}})
    assert book.records == {KEYS[0]: {"key": KEYS[0], "index": 0}}


def test_lines_end_at_line_feeds_only() -> None:
    values = [{"text": ODD}, ODD, [1.5, None]]
    text = "".join(map(json_line, values))
    assert text.count("\n") == 3
    assert numbered_jsonl("\n[1]\r\n\n2") == [(2, [1]), (4, 2)]
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        parse_jsonl("[" * 100_000)
    assert parse_jsonl(f"\n{text}\n \n") == values
    with pytest.raises(ValueError, match="line 3 of x is not JSON"):
        parse_jsonl('\n{"a": "\u2028"}\n{\n', "x")


def test_a_key_holds_every_fact(monkeypatch: Any) -> None:
    facts: dict[str, Any] = {"method": "kad", "seed": 0, "prompt": [{"role": "user"}], "param": 0.4}
    key = resume_key(**facts)
    assert key == resume_key(**dict(reversed(facts.items())))
    for name in facts:
        assert key != resume_key(**(facts | {name: "other"}))
    assert key != resume_key(**facts, dtype="bfloat16")
    monkeypatch.setattr(module, "__version__", "next")
    assert key != resume_key(**facts)


def test_a_changed_model_has_another_fingerprint(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "proxy", folder)
    found = fingerprint(str(folder))
    assert len(found) == 32
    # A copy is the same model, and a run's own files in the folder are not part of it.
    assert found == fingerprint(str(ASSETS / "proxy"))
    (folder / "out.jsonl").write_text("{}")
    assert found == fingerprint(str(folder))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert found != fingerprint(str(folder))
        (folder / name).write_bytes(content)
    assert fingerprint(str(folder / "config.json")) not in ("", found)
    # An adapter's base belongs to it.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder)})
    )
    adapted, content = fingerprint(str(adapter)), (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + b" ")
    assert adapted not in ("", found, fingerprint(str(adapter)))
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint("nobody/nothing") == ""
    # Large files by their times.
    monkeypatch.setattr(module, "HASHED_BYTES", 1000)
    large = fingerprint(str(folder))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert large != fingerprint(str(folder))


def test_model_facts() -> None:
    from models import base_model

    from tta_ext import demo_pair

    proxy = demo_pair().proxy
    facts = model_facts(proxy)
    assert facts == model_facts(proxy, str(ASSETS / "proxy"))
    assert facts["source"] == str(ASSETS / "proxy")
    assert facts["fingerprint"] == fingerprint(str(ASSETS / "proxy"))
    assert (facts["dtype"], facts["device"]) == ("float32", "cpu")
    assert facts != model_facts(proxy.bfloat16())
    with pytest.raises(ValueError, match="came from no file"):
        model_facts(base_model())


@forks
def test_an_evaluation_killed_in_the_middle_goes_on(tmp_path: Path) -> None:
    """Killed at any moment after its first batches; then it has every batch, and each once."""
    path, whole = tmp_path / "j.jsonl", tmp_path / "whole.jsonl"
    words = ["eval", "threshold:0.4", "--n", "4", "--batch-size", "1", "--journal"]
    with started([*words, str(path)], "add", 3):
        pass
    before = path.read_bytes()
    assert 3 <= before.count(b"\n") < 8
    for file in (path, whole):
        assert run([*words, str(file)]) == 0
    assert path.read_bytes().startswith(before[: before.rindex(b"\n") + 1])

    def texts(file: Path) -> list[tuple[str, Any]]:
        return [(r["key"], r["texts"]) for r in map(json.loads, file.read_text().splitlines())]

    assert texts(path) == texts(whole)
    assert len(texts(path)) == 8

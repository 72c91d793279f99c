"""The ``tta`` command, called in this process or in one that can be killed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tta_ext.cli.app import run
from tta_ext.journal import Journal

# By the pair that ships.
GENERATE = ["generate", "--max-new-tokens", "3"]


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    status = run(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def _watched(words: list[str], method: str, done: Any) -> None:
    plain = getattr(Journal, method)

    def told(self: Journal, *arguments: Any) -> None:
        plain(self, *arguments)
        done.release()

    setattr(Journal, method, told)
    run(words)


@contextmanager
def started(words: list[str], method: str, times: int) -> Iterator[BaseProcess]:
    """A command in a process of its own, in which a method of the journal has returned so often.

    It is a fork of a process without threads, which this one is not: whatever lock a thread holds
    at a fork is held in the child for ever.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    done = server.Semaphore(0)
    child = server.Process(target=_watched, args=(words, method, done))
    child.start()
    try:
        for _ in range(times):
            assert done.acquire(timeout=120)
        yield child
    finally:
        child.kill()
        child.join()

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


@contextmanager
def started(words: list[str], method: str, times: int) -> Iterator[BaseProcess]:
    """A command in a process of its own, in which a method of the journal has returned so often."""
    fork = multiprocessing.get_context("fork")
    done, plain = fork.Semaphore(0), getattr(Journal, method)

    def told(self: Journal, *arguments: Any) -> None:
        plain(self, *arguments)
        done.release()

    def work() -> None:
        setattr(Journal, method, told)
        run(words)

    child = fork.Process(target=work)
    child.start()
    try:
        for _ in range(times):
            assert done.acquire(timeout=120)
        yield child
    finally:
        child.kill()
        child.join()

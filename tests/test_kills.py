"""Commands killed at random moments go on with nothing lost or repeated."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from commands import started
from conftest import forks

from tta_ext.cli.app import run

PROMPTS = [f"Q: {a} + 5" for a in range(2, 6)]
SEARCH = ["--model", "demo", "--reward", "letter:s", "--max-new-tokens", "12", *PROMPTS]
COMMANDS = {
    "generate": ["generate", *PROMPTS, "--seed", "7", "--batch-size", "1", "--max-new-tokens",
                 "16", "--output"],
    "search": ["search", "--method", "best-of-n", "--n", "8", *SEARCH, "--seed", "7", "--output"],
    "compare": ["compare", "--method", "best_of_n:group=4", "--method", "aisp:n=4", "--samples",
                "8", *SEARCH, "--journal"],
    "eval": ["eval", "threshold:0.4", "base", "--n", "4", "--batch-size", "1", "--journal"],
    "sweep": ["sweep", "--params", "0.2,0.6", "--n", "4", "--batch-size", "1", "--journal"],
}  # fmt: skip


def items(path: Path) -> list[dict[str, Any]]:
    """What a file holds, without times."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("stats", "timing", "curve")}
        for line in path.read_text().splitlines()
    ]


def survive(name: str, times: int, folder: Path) -> None:
    """Kill a command at random moments, each time from where the last was killed, then let it end.

    A kill counts where it hit a run that had not ended; if all is done before, a new file begins.
    """
    rng, words = random.Random(name), COMMANDS[name]
    whole = folder / "whole.jsonl"
    start = monotonic()
    assert run([*words, str(whole)]) == 0
    lasts = monotonic() - start
    done, path = 0, folder / "0.jsonl"
    while done < times:
        before = path.read_bytes() if path.exists() else b""
        with started([*words, str(path)], "_read", 1) as child:
            # From here on a kill may hit anything.
            sleep(rng.uniform(0.0, lasts))
        hit = child.exitcode == -signal.SIGKILL
        done += hit
        assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
        if not hit or done == times:
            kept = path.read_bytes()
            assert run([*words, str(path)]) == 0
            assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
            assert items(path) == items(whole)
            path = folder / f"{done}.jsonl"


@forks
@pytest.mark.parametrize("name", ["generate", "compare"])
def test_a_killed_command_goes_on(name: str, tmp_path: Path) -> None:
    survive(name, 1, tmp_path)


@pytest.mark.slow
@forks
@pytest.mark.parametrize("name", COMMANDS)
def test_forty_kills(name: str, tmp_path: Path) -> None:
    survive(name, 8, tmp_path)

"""Commands killed at random moments go on with nothing lost or repeated."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from tta_ext.cli.app import run

PROMPTS = [f"Q: {a} + 5" for a in range(2, 8)]
SEARCH = ["--model", "demo", "--reward", "letter:s", "--max-new-tokens", "12", *PROMPTS]
COMMANDS = {
    "generate": ["generate", *PROMPTS, "--seed", "7", "--batch-size", "1", "--max-new-tokens",
                 "32", "--output"],
    "search": ["search", "--method", "best-of-n", "--n", "8", *SEARCH, "--seed", "7", "--output"],
    "compare": ["compare", "--method", "best_of_n:group=4", "--method", "aisp:n=4", "--samples",
                "8", *SEARCH, "--journal"],
    "eval": ["eval", "threshold:0.4", "base", "--n", "4", "--batch-size", "1", "--journal"],
    "sweep": ["sweep", "--params", "0.2,0.6", "--n", "4", "--batch-size", "1", "--journal"],
}  # fmt: skip

# Says when the file has been opened; from then on a kill may hit anything.
PROGRAM = """
import sys
from tta_ext.cli.app import run
from tta_ext.journal import Journal
read = Journal._read
def opened(self, path):
    read(self, path)
    print("opened", flush=True)
Journal._read = opened
run(sys.argv[1:])
"""


def items(path: Path) -> list[dict[str, Any]]:
    """What a file holds, without times."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("stats", "timing", "curve")}
        for line in path.read_text().splitlines()
    ]


def survive(name: str, kills: int, folder: Path) -> None:
    """Kill a command at random moments, each time from where the last was killed, then let it end.

    A kill counts where it hit a run that had not ended; if all is done before, a new file begins.
    """
    rng, words = random.Random(name), COMMANDS[name]
    whole = folder / "whole.jsonl"
    start = monotonic()
    assert run([*words, str(whole)]) == 0
    lasts = monotonic() - start
    done, path = 0, folder / "0.jsonl"
    while done < kills:
        before = path.read_bytes() if path.exists() else b""
        program = [sys.executable, "-c", PROGRAM, *words, str(path)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"opened\n"
            sleep(rng.uniform(0.0, lasts))
            child.kill()
        hit = child.returncode == -signal.SIGKILL
        done += hit
        assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
        if not hit or done == kills:
            kept = path.read_bytes()
            assert run([*words, str(path)]) == 0
            assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
            assert items(path) == items(whole)
            path = folder / f"{done}.jsonl"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill here")
@pytest.mark.parametrize("name", ["generate", "compare"])
def test_a_killed_command_goes_on(name: str, tmp_path: Path) -> None:
    survive(name, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill here")
@pytest.mark.parametrize("name", COMMANDS)
def test_forty_kills(name: str, tmp_path: Path) -> None:
    survive(name, 8, tmp_path)

"""The fuzzer (fuzz.py) and the operators' meanings (meanings.py): clean, and not blind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import pytest
import torch
from bounds import philox4x32
from draws import ARGUMENTS, SMALL, Draw
from meanings import MEANINGS

from tta_ext.schemas import OPS

HERE = Path(__file__).parent
names = pytest.mark.parametrize("name", sorted(OPS))


def judged(name: str, given: dict[str, Any], meant: dict[str, Any]) -> list[str]:
    """What the judge of some arguments finds in the results of others."""
    results = getattr(torch.ops.tta_ext, name)(*given.values())
    results = results if isinstance(results, tuple) else (results,)
    return list(MEANINGS[name](SimpleNamespace(**meant), *results))


def arguments(name: str, number: int) -> dict[str, Any]:
    given = dict(zip(OPS[name].inputs, ARGUMENTS[name](Draw(name, number, SMALL)), strict=True))
    return given | {"check": False} if "check" in given else given


def changed(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The same call but for one small thing."""
    if name == "greedy_knapsack":
        return given | {"capacity": given["capacity"] * 0.9}
    if name == "philox":
        return given | {"key": given["key"] ^ 1}
    if name in ("deferral_mask", "deferral_probs", "deferral_stats"):
        return given | {"param": given["param"] + 1e-4}
    if name == "implicit_reward_probs":
        return given | {"temperature": given["temperature"] * 1.001}
    if name in ("importance_weights", "control_merge"):
        return (
            given | {"sigma": given["sigma"] * 1.001, "lam": given["lam"] * 1.001}
            if ("lam" in given)
            else given | {"sigma": given["sigma"] * 1.001}
        )
    return given | {"seed": given["seed"] ^ 1}


def test_every_operator_has_a_judge() -> None:
    assert MEANINGS.keys() == OPS.keys()


@names
def test_judges_agree_and_are_not_blind(native: None, name: str) -> None:
    """Nothing in what was asked; something in the results of a slightly other call."""
    seen = 0
    for number in range(4000, 4040):
        given = arguments(name, number)
        assert not judged(name, given, given), number
        seen += bool(judged(name, changed(name, given), given))
    assert seen, "a judge that finds nothing"


def test_random_words_of_the_judges() -> None:
    """The known answers of Random123."""
    for counter, key, want in (
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([-1] * 4, (-1, -1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        words = philox4x32(torch.tensor(counter).numpy(), key)
        assert " ".join(f"{int(word):08x}" for word in words) == want


def test_some_cases(native: None) -> None:
    """As CI runs it, for 300 cases in place of a minute."""
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), "--cases", "300", "--seed", "7"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 calls" in done.stdout


PLANTED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import fuzz
real = fuzz.fault_of
def fault_of(seed, number, counts):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        time.sleep(3600)
    return "planted" if number == 7 else ""
fuzz.fault_of = fault_of
raise SystemExit(fuzz.fuzz(1, lambda number: number < 9, hang=2.0))
"""


def test_deaths_and_endless_calls_are_told_with_their_number(native: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(HERE)], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stdout + done.stderr
    out = done.stdout
    assert "ended its process (-11)\n  python tests/fuzz.py --seed 1 --case 3" in out
    assert "did not end\n  python tests/fuzz.py --seed 1 --case 5" in out
    assert f"planted\n  {fuzz.again(1, 7)}" in out


READS = """
import sys
sys.path.insert(0, sys.argv[1])
import ctypes, spoiling, torch
x = spoiling.at_the_edge(torch.arange(6.0).view(2, 3)[:, :2])
assert x.tolist() == [[0, 1], [3, 4]] and x.stride() == (3, 1)
end = x.data_ptr() + 5 * 4
ctypes.string_at(end - 4, 4)
print("inside", flush=True)
ctypes.string_at(end, 1)
print("outside")
"""


def test_a_byte_beyond_an_input_cannot_be_read() -> None:
    done = subprocess.run([sys.executable, "-c", READS, str(HERE)], capture_output=True, text=True)
    assert done.returncode == -11, done.stderr
    assert done.stdout == "inside\n"

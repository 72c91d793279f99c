"""Operators in several threads at once and in other processes: the bits of one call after another.
And memory, which many calls must not add up.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from draws import ARGUMENTS, SMALL, Draw
from spoiling import bits

from tta_ext import ops
from tta_ext.schemas import OPS

CALLS = [(name, number) for number in range(6) for name in sorted(OPS)]


def results(call: tuple[str, int]) -> list[bytes]:
    """The bits of an operator's results, or why it refuses."""
    name, number = call
    try:
        found = getattr(torch.ops.tta_ext, name)(*ARGUMENTS[name](Draw(name, number, SMALL)))
    except RuntimeError as error:
        return [str(error).splitlines()[0].encode()]
    return [bits(x) for x in (found if isinstance(found, tuple) else (found,))]


def test_eight_threads_get_the_bits_of_one(native: None) -> None:
    want = {call: results(call) for call in CALLS}
    with ThreadPoolExecutor(8) as pool:
        for call, found in zip(CALLS * 8, pool.map(results, CALLS * 8), strict=True):
            assert found == want[call], call


def test_eight_threads_share_the_numbers_kept_by_the_public_operators(native: None) -> None:
    """Each with seeds of its own, more than are kept."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))

    def tokens(first: int) -> list[int]:
        return [
            int(ops.categorical_sample(logits, seed=seed, position=seed % 7))
            for seed in range(first, first + 1500)
        ]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(tokens, range(0, 12000, 1500)))
    assert found == [tokens(first) for first in range(0, 12000, 1500)]


def _all(calls: list[tuple[str, int]]) -> list[list[bytes]]:
    torch.set_num_threads(1)
    ops.normal(1, seed=0)  # loads the library
    return [results(call) for call in calls]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_other_processes_get_the_same_bits(native: None, method: str) -> None:
    """However they are started; after fork with one thread, as with torch's own operators."""
    torch.set_num_threads(1)
    calls = CALLS[: len(OPS)]
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.apply(_all, (calls,))
    assert found == [results(call) for call in calls]


MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import resource, torch
from cases import operator_arguments
from tta_ext import ops
from tta_ext.schemas import OPS
torch.set_num_threads(1)
ops.normal(1, seed=0)
few, many = map(int, sys.argv[2:])
page = resource.getpagesize()
def held():
    return int(open("/proc/self/statm").read().split()[1]) * page >> 10
logits = torch.zeros(1, 8)
def named(number):  # what the public operators keep of numbers, up to a limit
    ops.categorical_sample(logits, seed=number, position=number, sequence=number)
for number in range(10_000):
    named(number)
for name, spec in OPS.items():
    call, args = getattr(torch.ops.tta_ext, name), operator_arguments(name)
    outputs = dict(zip(spec.outputs, spec.allocate(*args)))
    def run(begin, end):
        for number in range(begin, end):
            call.out(*args, **outputs)
            if name == "categorical_sample":
                named(number)
    run(0, few)
    before = held()
    run(few, many)
    print(name, held() - before, flush=True)
"""


def grown(few: int, many: int) -> dict[str, int]:
    """KiB that a process holds more after many calls of each operator than after few."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, here, str(few), str(many)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {name: int(kib) for name, kib in map(str.split, done.stdout.splitlines())}


def test_three_thousand_calls_hold_no_more_memory_than_one(native: None) -> None:
    found = grown(1_000, 3_000)
    assert found.keys() == OPS.keys()
    assert max(found.values()) <= 1024, found


@pytest.mark.slow
def test_five_million_calls_hold_no_more_memory_than_half_a_million(native: None) -> None:
    """Of all operators together. A kibibyte a thousand calls would be 281 for one of them."""
    assert max(grown(31_250, 312_500).values()) <= 256

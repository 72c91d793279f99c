"""What a call of each CUDA operator executes, counted without a GPU.

    python -m tools.ptx.profiles [--json FILE]    a table, and the file that roofline.py reads
    python -m tools.ptx.profiles --steps OP       the path of an operator's kernels by source line

Needs what emulate.py needs. The call is one as decoding makes it (common_cases.cpp). The emulator
counts the memory requests of a launch's first block, which has a tile of the row; the block that
arrives last looks at one tile again, which L2 still holds. So, of the first block,

    dram_ratio = 32 bytes * sectors requested / bytes that the block must move (block_bytes)

where a word that all lanes of a warp read counts once for an instruction of the block, the other
warps having it in L1. Of ONE_PASS operators these are the sectors of all launches. The others read
rows again in later launches, which L2 serves where it is large enough: there the ratio is that of
the first launch, and what the rest reads is in roofline.py (``again``). ARITHMETIC has none.

``ptx`` are PTX instructions of all threads of all blocks; ``machine`` is what machine_code.py makes
of the same call: machine instructions of all warps (32 a warp), the units that execute them, and
the path of a block, at rows of LONG and of SHORT whole tiles. Where blocks are plenty they take
SPAN tiles, one after another or a warp each (span_of in csrc/cuda/launch.h; of the noise's kernels:
fewer warps a block, more work a thread), and do less for each: ``one`` has the figures of the call
with one tile a block, ``spanned`` those with such blocks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_times import DRAFT, ROLLOUTS, SHARDS, STEPS
from tta_ext.build import BuildError

from . import machine_code
from .emulator import LAUNCH, Emulator, Failed, concurrently

PROFILE_VOCAB = 128256
DIM = 4096  # like the other shapes, as in common_cases.cpp
TILE = 4096  # elements of a row that a block has
SPAN = 4  # tiles that a block takes at most, where operators share them (launch.h)
BANDS_BYTES = 4096 * 8  # counters of a row's bands, which the blocks of the first launch clear
NODES_BYTES = 64 * 4  # of a tile of the base: sums that masked ones are made of (masked_sum.cuh)
SECTOR = 32

LONG, SHORT = 32, 8  # tiles of the rows that the path is looked at with

# Those that read each row once: the ratio counts all their launches.
ONE_PASS = (
    "categorical_sample",
    "deferral_propose",
    "deferral_sample",
    "implicit_reward",
    "prelogit_perturb",
    "normal",
    "philox",
    "control_merge",
)
# A block has a few words of memory only.
ARITHMETIC = ("importance_weights", "control_update")
# Those whose first launch writes the nodes of its tiles.
WITH_NODES = (
    "deferral_propose greedy",
    "deferral_sample greedy",
    "deferral_probs",
    "deferral_stats",
    "deferral_verify",
    "deferral_verify mass",
    "deferral_verify unrelated",
)
# Those whose blocks have more to do, where they are plenty.
SPANNED = (
    "categorical_sample",
    "deferral_propose",
    "deferral_propose greedy",
    "deferral_propose knapsack",
    "deferral_sample",
    "deferral_sample greedy",
    "deferral_sample deferred",
    "deferral_mask",
    "deferral_mask knapsack",
    "deferral_probs",
    "deferral_stats",
    "deferral_verify",
    "deferral_verify mass",
    "deferral_verify unrelated",
    "implicit_reward",
    "implicit_reward_probs",
    "prelogit_perturb",
    "normal",
)
OPS = (
    *SPANNED,
    "greedy_knapsack",
    "importance_weights",
    "control_update",
    "control_merge",
    "philox",
)
FLOAT32_ONLY = (
    "greedy_knapsack",
    "importance_weights",
    "control_update",
    "control_merge",
    "normal",
    "philox",
)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Launch:
    """The profile of one launch; sectors and wavefronts are those of its first block."""

    kernel: str
    ptx: int
    sectors: int
    wavefronts: int
    ideal_wavefronts: int


@dataclass(frozen=True)
class Machine:
    """All launches of one kernel, as machine code for sm_90.

    Attributes:
        launches: their number.
        instructions: of all launches, 32 a warp.
        units: turns of the units' lanes, of all launches.
        path: cycles of the last block of one launch at a row of LONG tiles, by what it waits for.
        path_per_tile: cycles that another tile of the row adds.
    """

    kernel: str
    launches: int
    instructions: int
    units: dict[str, int]
    path: dict[str, int]
    path_per_tile: float


@dataclass(frozen=True)
class Figures:
    """What a call comes to with so many tiles a block."""

    dram_ratio: float | None  # None: ARITHMETIC
    bank_conflicts: int  # wavefronts more than the bytes need
    ptx_per_element: float
    instructions_per_element: float
    machine: list[Machine]


@dataclass(frozen=True)
class Profile:
    """An operator's common case, with one tile a block and with SPAN."""

    op: str
    dtype: str
    batch: int
    elements: int
    launches: list[Launch]  # with one tile a block
    one: Figures
    spanned: Figures | None  # None: blocks never take more


_REQUESTS = re.compile(
    r"^(global|shared) PTX .*?: req (\d+) lanes/req [\d.]+ bytes (\d+) "
    r"(?:sectors|wavefronts) (\d+) \(ideal (\d+)\)",
    re.MULTILINE,
)


def plain(mangled: str) -> str:
    """A kernel's name without namespaces and arguments."""
    return re.sub(r"^_ZN.*?\d+([a-z_]+_kernel).*$", r"\1", mangled)


def read_profile(text: str) -> list[Launch]:
    """The launches of a profile that the emulator printed; kernels have their mangled names."""
    parts = LAUNCH.split(text)[1:]
    launches = []
    for name, instructions, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        sectors = wavefronts = ideal = 0
        for space, requests, size, units, least in _REQUESTS.findall(body):
            if space == "shared":
                wavefronts += int(units)
                ideal += int(least)
                continue
            broadcast = int(size) > SECTOR * int(units)
            sectors += max(int(units) // int(requests), 1) if broadcast else int(units)
        launches.append(Launch(name, int(instructions), sectors, wavefronts, ideal))
    return launches


def elements_of(op: str) -> int:
    """Elements of an operator's input; normals, for control_update."""
    if op == "prelogit_perturb":
        return ROLLOUTS * DIM
    if op == "control_update":
        return ROLLOUTS * STEPS * DIM
    if op == "importance_weights":
        return ROLLOUTS
    if op in ("normal", "philox", "control_merge"):
        return STEPS * DIM
    if op.startswith("deferral_verify"):
        return PROFILE_VOCAB * (2 * DRAFT + 1)
    return PROFILE_VOCAB * (3 if op.startswith("implicit_reward") else 1)


def block_bytes(op: str, size: int, span: int) -> int:
    """Bytes that the first block of an operator's first launch must move, with ``span`` tiles."""
    blocks = -(-PROFILE_VOCAB // (TILE * span))  # of a row
    special = {
        "deferral_mask knapsack": span * TILE * size + BANDS_BYTES // blocks,
        "greedy_knapsack": TILE * 8 + BANDS_BYTES // blocks,
        "prelogit_perturb": TILE * (2 * size + 4),
        "normal": span * 64 * 2 * 16,  # two Philox blocks a thread, or SPAN times as many
        "philox": 2 * 256 * 64,  # 32 bytes a thread, in halves: L1 has the second one's sector
        "control_merge": 4 * 128 * (SHARDS + 2) * 4,
    }
    models = 3 if op.startswith("implicit_reward") else 1
    nodes = span * NODES_BYTES if op in WITH_NODES else 0
    return special.get(op, models * span * TILE * size + nodes)


def dram_ratio(op: str, dtype: str, launches: list[Launch], span: int) -> float | None:
    """See the head of this file."""
    if op in ARITHMETIC:
        return None
    sectors = sum(x.sectors for x in (launches if op in ONE_PASS else launches[:1]))
    return round(SECTOR * sectors / block_bytes(op, 4 if dtype == "float32" else 2, span), 4)


def conflicts(launches: list[Launch]) -> int:
    """Wavefronts more than the bytes need."""
    return sum(x.wavefronts - x.ideal_wavefronts for x in launches)


def machine_of(
    emulator: Emulator, op: str, dtype: str, launches: list[Launch], *options: object
) -> list[Machine]:
    """The kernels of a common case as machine code, in the order of their first launches."""
    vocabularies = PROFILE_VOCAB, LONG * TILE, SHORT * TILE
    common, long, short = (
        emulator.count("common", op, "--vocab", vocab, "--dtype", dtype, *options)
        for vocab in vocabularies
    )
    found = []
    for kernel in dict.fromkeys(launch.kernel for launch in launches):
        times = sum(launch.kernel == kernel for launch in launches)
        cycles = [of[kernel].path.cycles() / times for of in (long, short)]
        found.append(
            Machine(
                kernel=plain(kernel),
                launches=times,
                instructions=round(common[kernel].instructions),
                units={unit: round(n) for unit, n in common[kernel].units.items()},
                path={why: round(n / times) for why, n in long[kernel].path.waits.items()},
                path_per_tile=round((cycles[0] - cycles[1]) / (LONG - SHORT), 2),
            )
        )
    return found


def launches_of(emulator: Emulator, op: str, dtype: str, *options: object) -> list[Launch]:
    """One call of an operator's common case."""
    result = emulator("common", op, "--vocab", PROFILE_VOCAB, "--dtype", dtype, *options, prof=1)
    if result.returncode:
        raise Failed(f"{op} {dtype}\n{result.stdout}{result.stderr[-4000:]}")
    return read_profile(result.stderr)


def blocks_of(emulator: Emulator, op: str, dtype: str, span: int) -> tuple[list[Launch], Figures]:
    """The launches and figures of the common case with ``span`` tiles a block, 1 or SPAN."""
    # As on a device that one block fills, blocks take as many tiles as they may.
    options = ("--width", 1) if span == SPAN else ()
    launches = launches_of(emulator, op, dtype, *options)
    machine = machine_of(emulator, op, dtype, launches, *options)
    elements = elements_of(op)
    return launches, Figures(
        dram_ratio=dram_ratio(op, dtype, launches, span),
        bank_conflicts=conflicts(launches),
        ptx_per_element=round(sum(x.ptx for x in launches) / elements, 2),
        instructions_per_element=round(sum(x.instructions for x in machine) / elements, 2),
        machine=machine,
    )


def profile(emulator: Emulator, op: str, dtype: str) -> Profile:
    """An operator's common case, with one tile a block and with SPAN."""
    launches, one = blocks_of(emulator, op, dtype, 1)
    return Profile(
        op=op,
        dtype=dtype,
        batch=1,
        elements=elements_of(op),
        launches=[replace(x, kernel=plain(x.kernel)) for x in launches],
        one=one,
        spanned=blocks_of(emulator, op, dtype, SPAN)[1] if op in SPANNED else None,
    )


def cases() -> list[tuple[str, str]]:
    """(operator, dtype) of every profile."""
    return [
        (op, dtype)
        for op in OPS
        for dtype in DTYPES
        if dtype == "float32" or op not in FLOAT32_ONLY
    ]


def read(path: Path) -> list[Profile]:
    """The profiles that ``--json`` wrote."""

    def figures(part: dict[str, Any]) -> Figures:
        return Figures(**{**part, "machine": [Machine(**kernel) for kernel in part["machine"]]})

    return [
        Profile(
            **{
                **p,
                "launches": [Launch(**launch) for launch in p["launches"]],
                "one": figures(p["one"]),
                "spanned": figures(p["spanned"]) if p["spanned"] else None,
            }
        )
        for p in json.loads(path.read_text())
    ]


def show(profiles: Iterable[Profile]) -> None:
    """The table, as plain text: machine instructions by unit, and the paths of all launches."""
    print(
        f"{'operator':27}{'dtype':10}{'DRAM/least':>12}{'conflicts':>11}{'PTX/el':>9}"
        f"{'machine/el':>12}{'spanned':>9}{'path':>8}  units an element"
    )
    for p in profiles:
        one = p.one
        ratio = "-" if one.dram_ratio is None else f"{one.dram_ratio:.3f}"
        more = p.spanned.instructions_per_element if p.spanned else "-"
        path = sum(x.launches * sum(x.path.values()) for x in one.machine)
        units = {
            unit: sum(x.units.get(unit, 0) for x in one.machine) / p.elements
            for unit in machine_code.UNIT_NAMES
        }
        print(
            f"{p.op:27}{p.dtype:10}{ratio:>12}{one.bank_conflicts:>11}{one.ptx_per_element:>9}"
            f"{one.instructions_per_element:>12}{more:>9}{path:>8}  "
            + " ".join(f"{unit} {n:.1f}" for unit, n in units.items())
        )


def show_steps(emulator: Emulator, op: str, dtype: str) -> None:
    """Where the last block of each kernel spends its cycles, in the order of the machine code."""
    ran = emulator.count("common", op, "--vocab", LONG * TILE, "--dtype", dtype)
    for kernel, executed in ran.items():
        print(f"{plain(kernel)}: {executed.path.cycles():.0f} cycles at {LONG} tiles")
        for step, cycles in executed.path.steps.items():
            if cycles >= 0.5:
                print(f"{cycles:>8.0f}  {step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the profiles, for roofline.py")
    parser.add_argument("--steps", metavar="OP", choices=OPS, help="path of OP")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of --steps")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            emulator = Emulator(Path(folder))
            if arguments.steps:
                show_steps(emulator, arguments.steps, arguments.dtype)
                return
            found = concurrently(lambda case: profile(emulator, *case), cases())
    except (BuildError, Failed) as error:
        sys.exit(f"profiles: {error}")
    show(found)
    if arguments.json:
        lines = ",\n".join(json.dumps(asdict(p)) for p in found)
        arguments.json.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()

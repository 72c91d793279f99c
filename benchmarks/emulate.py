"""What nvcc's PTX of every CUDA kernel does, executed without a GPU: checks, and a profile.

    python -m benchmarks.emulate             run both, write benchmarks/results/emulation.json
    python -m benchmarks.emulate --check     is that file of these sources, and within its bounds?
    python -m benchmarks.emulate --bounds    print MOST_INSTRUCTIONS as that file would have it
    python -m benchmarks.emulate --steps OP  the path of an operator's kernels by source line

Needs nvcc, nvdisasm and the PTX emulator whose folder ``TTA_EXT_PTXEMU`` names (without them: a
sentence, and exit code 0). csrc/testing/cuda is linked against the emulator's CUDA runtime; every
family runs in ascending, descending and random thread orders, with random switches between threads,
and compares each output with the CPU kernels bit for bit. The emulator's check of races between
blocks is off: it does not know the pattern by which the last block to arrive takes over (its README
says so; the SIMT layer in csrc/testing/simt checks that one).

The profile takes one call as decoding makes it (common_cases.cpp). The emulator counts the memory
requests of a launch's first block, which has a tile of the row; the block that arrives last looks
at one tile again, which L2 still holds. So, of the first block,

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
import concurrent.futures
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from scripts import kernel_table
from tta_ext.build import BuildError, cuda, toolchain

from . import machine_code

Task = TypeVar("Task")
Done = TypeVar("Done")

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RESULT = ROOT / "benchmarks" / "results" / "emulation.json"

# Repetitions of each family: so many that every kernel is launched, in most orders.
FAMILIES = {"deferral": 3, "verify": 3, "sampling": 3, "knapsack": 3, "prelogit": 4, "control": 9}
# Thread order (0 ascending, 1 descending, else random), the probability of a switch to another
# thread at a memory access, and the blocks that fill the device (1: blocks take several tiles).
ORDERS = ((0, 0.0, 512), (1, 0.0, 1), (2, 0.01, 1), (3, 0.1, 512))
VOCAB = 9000

PROFILE_VOCAB = 128256
DIM, ROLLOUTS, STEPS, DRAFT, SHARDS = 4096, 32, 32, 4, 8  # as in common_cases.cpp
TILE = 4096  # elements of a row that a block has
SPAN = 4  # tiles that a block takes at most, where operators share them (launch.h)
BANDS_BYTES = 4096 * 8  # counters of a row's bands, which the blocks of the first launch clear
NODES_BYTES = 64 * 4  # of a tile of the base: sums that masked ones are made of (kad.cuh)
SECTOR = 32
MOST_DRAM_RATIO = 1.05

LONG, SHORT = 32, 8  # tiles of the rows that the path is looked at with

# Machine instructions for an element of the input (a normal, for control_update) that a change must
# not exceed, with one tile a block and with SPAN: SLACK times what was counted last (--bounds).
SLACK = 1.03
MOST_INSTRUCTIONS: dict[str, tuple[float, float]] = {
    "categorical_sample": (25.2, 23.1),
    "deferral_propose": (26.3, 23.8),
    "deferral_sample": (26.8, 23.9),
    "deferral_sample deferred": (51.7, 46.8),
    "deferral_propose greedy": (32.1, 26.0),
    "deferral_sample greedy": (63.5, 50.6),
    "deferral_propose knapsack": (33.0, 30.4),
    "deferral_mask": (39.6, 33.9),
    "deferral_mask knapsack": (83.0, 62.9),
    "deferral_probs": (118.7, 107.1),
    "deferral_stats": (41.0, 34.4),
    "deferral_verify": (33.3, 26.7),
    "deferral_verify mass": (35.4, 27.9),
    "deferral_verify unrelated": (40.0, 32.9),
    "implicit_reward": (14.9, 14.4),
    "implicit_reward_probs": (28.2, 27.8),
    "greedy_knapsack": (110.3, 110.3),
    "prelogit_perturb": (56.1, 47.9),
    "importance_weights": (1654.7, 1654.7),
    "control_update": (47.7, 47.7),
    "control_merge": (52.3, 52.3),
    "normal": (47.6, 41.1),
    "philox": (68.0, 68.0),
}
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
# Wavefronts that the first blocks of all launches may lose to bank conflicts: of operators that
# count into shared memory by the data's own values. The others have none.
MOST_CONFLICTS = {"deferral_mask knapsack": 1278, "greedy_knapsack": 600}
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


def digest() -> str:
    """SHA-256 of the kernels, of the program that runs them and of what it compares them with."""
    program = ("testing/check.h", "testing/host.h", "testing/cuda/*")
    files = [
        path
        for pattern in ("core/*", "cpu/*", "cuda/*", *program)
        for path in sorted(CSRC.glob(pattern))
        if path.is_file()
    ]
    return toolchain.digest_of(CSRC, files, cuda.FLAGS)


def concurrently(function: Callable[[Task], Done], tasks: Sequence[Task]) -> list[Done]:
    """The function of every task, in their order, a thread each core: programs do the work."""
    with concurrent.futures.ThreadPoolExecutor(toolchain.job_count(len(tasks))) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except Failed:
            pool.shutdown(cancel_futures=True)
            raise


def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """A program that must succeed; what it prints comes back."""
    done = subprocess.run(list(command), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"emulate: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


class Failed(Exception):
    """A program on the emulated device ended with an error."""


class Emulator:
    """A program on the emulated device, built in a folder of its own; by default kernels_test."""

    def __init__(
        self,
        tool: Path,
        folder: Path,
        nvdisasm: str,
        kernels: Sequence[Path] = (),
        hosts: Sequence[Path] = (),
    ) -> None:
        self.tool = folder / "ptxemu"
        # It is built where it stands, and the folder given may be read-only.
        shutil.copytree(tool, self.tool, ignore=shutil.ignore_patterns("build"))
        self.tool.chmod(0o755)
        run(["make", "-s", "-C", str(self.tool)])
        self.folder = folder
        self.nvcc = cuda.find_toolkit().compiler.command
        if not kernels:
            kernels = sorted((CSRC / "cuda").glob("*.cu"))
            hosts = sorted([*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "testing/cuda").glob("*.cpp")])
        sources = [*kernels, *hosts]
        objects = concurrently(self._compile, sources)
        self.ptx = [folder / path.stem / f"{path.stem}.ptx" for path in kernels]
        self.counted = {}
        self.listings = {}
        for path in self.ptx:
            counted = machine_code.count_blocks(path.read_text(), f"tta_counts_{path.stem}")
            self.counted[path.with_suffix(".counted.ptx")] = counted
            path.with_suffix(".counted.ptx").write_text(counted.text)
            cubin = path.with_suffix(".sm_90.cubin")
            listing = machine_code.disassemble(nvdisasm, cubin)
            self.listings[counted.symbol] = machine_code.machine_blocks(listing)
        reader = folder / "reader.cu"
        reader.write_text(machine_code.reader_source(self.counted.values()))
        objects.append(self._compile(reader))
        self.program = str(folder / "program")
        library = str(self.tool / "build")
        run([*self.nvcc, "-cudart", "none", *objects, "-o", self.program, "-L" + library,
             "-lfakecudart", "-Xlinker", f"-rpath={library}", "-lpthread"])  # fmt: skip

    def _compile(self, source: Path) -> str:
        target = self.folder / f"{source.parent.name}_{source.stem}.o"
        command = [*self.nvcc, "-std=c++17", f"-I{CSRC}", "-c", str(source), "-o", str(target)]
        if source.suffix == ".cu":
            keep = self.folder / source.stem
            keep.mkdir()
            command += ["-O3", "--fmad=false", "-lineinfo", "--keep", "--keep-dir", str(keep),
                        "-gencode=arch=compute_90,code=[compute_90,sm_90]"]  # fmt: skip
        else:
            command += ["-O1", "-Xcompiler=-ffp-contract=off,-fno-math-errno"]
        run(command)
        return str(target)

    def __call__(
        self,
        *arguments: object,
        ptx: Iterable[Path] = (),
        counts: Path | None = None,
        **settings: object,
    ) -> subprocess.CompletedProcess[str]:
        """The program with arguments; settings are the emulator's (``seed=1`` for PTXEMU_SEED).
        ``counts``: where counters go, with the kernels that have them.
        """
        environment = dict(os.environ, PTXEMU_PTX=":".join(map(str, ptx or self.ptx)))
        environment["PTXEMU_INTERBLOCK"] = "0"
        if counts:
            environment["TTA_EXT_COUNTS"] = str(counts)
        environment |= {f"PTXEMU_{name.upper()}": str(value) for name, value in settings.items()}
        return subprocess.run(
            [self.program, *map(str, arguments)], capture_output=True, text=True, env=environment
        )

    def count(self, *arguments: object) -> dict[str, machine_code.Executed]:
        """What each kernel executes in a run, in machine code, by its mangled name."""
        # What is counted does not depend on the checks; they ran on the kernels without counters.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder) / "counts"
            result = self(*arguments, ptx=self.counted, counts=path, race=0, uninit=0)
            if result.returncode:
                raise Failed(f"{arguments}, counted\n{result.stdout}{result.stderr[-4000:]}")
            counts = machine_code.read_counts(path)
        found: dict[str, machine_code.Executed] = {}
        for counted in self.counted.values():
            listing = self.listings[counted.symbol]
            found |= machine_code.executed(listing, counted, counts[counted.symbol])
        return found


_LAUNCH = re.compile(r"^(\S.*): (\d+) instr$", re.MULTILINE)
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
    parts = _LAUNCH.split(text)[1:]
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


# What nvcc makes of an anonymous namespace: the file's name between hashes.
_NAMESPACE = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")


def short(mangled: str) -> str:
    """A kernel's file (not of templates in headers), name, and template arguments."""
    file = _NAMESPACE.search(mangled)
    kernel = re.search(r"[a-z_]+_kernel(?:I\w*?E+v)?", _NAMESPACE.sub("", mangled))
    return (f"{file[1]}: " if file else "") + (kernel[0] if kernel else mangled)


def kernels_of(ptx: Iterable[Path]) -> set[str]:
    """The mangled names of all kernels in PTX files."""
    return {name for path in ptx for name in re.findall(r"\.entry\s+(\w+)", path.read_text())}


def check_family(
    emulator: Emulator, family: str, seed: int, preempt: float, width: int
) -> tuple[dict[str, object], Counter[str]]:
    """A family in an order: what is noted about it, and how often each kernel was launched."""
    result = emulator(
        family, "--repetitions", FAMILIES[family], "--seed", seed + 1, "--vocab", VOCAB,
        "--width", width, seed=seed, preempt=preempt, prof=1,
    )  # fmt: skip
    if result.returncode:
        raise Failed(
            f"{family}, order {seed}, switches {preempt}, width {width}\n"
            f"{result.stdout[-2000:]}{result.stderr[-4000:]}"
        )
    print(
        f"{family}: order {seed}, switches {preempt}, width {width}: equal to the CPU", flush=True
    )
    note = {"family": family, "order": seed, "switches": preempt, "width": width, "passed": True}
    return note, Counter(name for name, _ in _LAUNCH.findall(result.stderr))


def check_families(
    emulator: Emulator, orders: Iterable[tuple[int, float, int]]
) -> tuple[list[dict[str, object]], dict[str, int]]:
    """Every family in every order, and the launches of every kernel; the first that differs from
    the CPU ends the script, as does a kernel that no family launched.
    """
    tasks = [(family, *order) for order in orders for family in FAMILIES]
    done = list(concurrently(lambda task: check_family(emulator, *task), tasks))
    launches: Counter[str] = sum((ran for _, ran in done), Counter())
    kernels = kernels_of(emulator.ptx)
    if missing := sorted(map(short, kernels - launches.keys())):
        raise Failed(f"no family launched {', '.join(missing)}")
    counts: Counter[str] = Counter()
    for kernel in kernels:
        counts[short(kernel)] += launches[kernel]
    return [note for note, _ in done], dict(sorted(counts.items()))


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
        for op in MOST_INSTRUCTIONS
        for dtype in DTYPES
        if dtype == "float32" or op not in FLOAT32_ONLY
    ]


def faults(profiles: Iterable[Profile]) -> list[str]:
    """What exceeds its bound, a line each."""
    found = []
    for p in profiles:
        for of, most in zip((p.one, p.spanned), MOST_INSTRUCTIONS[p.op], strict=True):
            if of is None:
                continue
            name = f"{p.op} {p.dtype}{'' if of is p.one else f', {SPAN} tiles a block'}"
            if of.dram_ratio is not None and of.dram_ratio > MOST_DRAM_RATIO:
                found.append(f"{name}: {of.dram_ratio} of the compulsory bytes > {MOST_DRAM_RATIO}")
            if of.bank_conflicts > MOST_CONFLICTS.get(p.op, 0):
                found.append(
                    f"{name}: {of.bank_conflicts} wavefronts lost to bank conflicts > "
                    f"{MOST_CONFLICTS.get(p.op, 0)}"
                )
            if of.instructions_per_element > most:
                found.append(
                    f"{name}: {of.instructions_per_element} machine instructions an element > "
                    f"{most}"
                )
    return found


def recorded() -> tuple[str, list[Profile]]:
    """The hash and the profiles that are checked in."""

    def figures(part: dict[str, Any]) -> Figures:
        return Figures(**{**part, "machine": [Machine(**kernel) for kernel in part["machine"]]})

    record = json.loads(RESULT.read_text())
    profiles = [
        Profile(
            **{
                **p,
                "launches": [Launch(**launch) for launch in p["launches"]],
                "one": figures(p["one"]),
                "spanned": figures(p["spanned"]) if p["spanned"] else None,
            }
        )
        for p in record["profile"]
    ]
    return record["sources"], profiles


def bounds(profiles: Iterable[Profile]) -> str:
    """MOST_INSTRUCTIONS and MOST_CONFLICTS for these profiles, as they stand in this file."""
    most: dict[str, list[float]] = {}
    lost: dict[str, int] = {}
    for p in profiles:
        both = [p.one, p.spanned or p.one]
        before = most.get(p.op, [0.0, 0.0])
        most[p.op] = [max(n, x.instructions_per_element)
                      for n, x in zip(before, both, strict=True)]  # fmt: skip
        lost[p.op] = max(lost.get(p.op, 0), *(x.bank_conflicts for x in both))
    lines = ["MOST_INSTRUCTIONS: dict[str, tuple[float, float]] = {"]
    for op, figures in most.items():
        one, more = (math.ceil(10 * SLACK * n) / 10 for n in figures)
        lines.append(f'    "{op}": ({one}, {more}),')
    some = ", ".join(f'"{op}": {math.ceil(SLACK * n)}' for op, n in lost.items() if n)
    return "\n".join([*lines, "}", f"MOST_CONFLICTS = {{{some}}}"])


def check() -> list[str]:
    """Why the checked-in figures do not stand; empty if they do."""
    if not RESULT.exists():
        return ["benchmarks/results/emulation.json is missing: run python -m benchmarks.emulate"]
    sources, profiles = recorded()
    if sources != digest():
        return ["benchmarks/results/emulation.json is stale: run python -m benchmarks.emulate"]
    return faults(profiles)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="look at the checked-in figures only")
    parser.add_argument("--bounds", action="store_true", help="print MOST_INSTRUCTIONS anew")
    parser.add_argument("--steps", metavar="OP", choices=MOST_INSTRUCTIONS, help="path of OP")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of --steps")
    parser.add_argument("--profile-only", action="store_true", help="leave the orders out")
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the figures")
    arguments = parser.parse_args()
    if arguments.bounds:
        print(bounds(recorded()[1]))
        return 0
    if arguments.check:
        problems = check()
    else:
        tool = os.environ.get("TTA_EXT_PTXEMU", "")
        if not tool:
            print("emulate: skipped, TTA_EXT_PTXEMU does not name the emulator's folder")
            return 0
        try:
            cuda.find_toolkit()
            nvdisasm = kernel_table.tool("nvdisasm")
        except BuildError as error:
            print(f"emulate: skipped, {error}")
            return 0
        before = digest()
        with tempfile.TemporaryDirectory() as folder:
            emulator = Emulator(Path(tool), Path(folder), nvdisasm)
            if digest() != before:
                sys.exit("emulate: the sources changed while they were compiled")
            try:
                if arguments.steps:
                    show_steps(emulator, arguments.steps, arguments.dtype)
                    return 0
                ran, launches = (
                    ([], {}) if arguments.profile_only else check_families(emulator, ORDERS)
                )
                profiles = concurrently(lambda case: profile(emulator, *case), cases())
            except Failed as error:
                sys.exit(f"emulate: {error}")
        record = {
            "sources": before,
            "vocab": PROFILE_VOCAB,
            "checks": ran,
            "launches": launches,
            "profile": [asdict(p) for p in profiles],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        show(profiles)
        problems = faults(profiles)
    for line in problems:
        print(line)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

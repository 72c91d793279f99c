"""Machine instructions that a kernel's launches execute, and how long a block of it takes on its
own, found without a GPU.

nvcc's PTX runs on the emulator with a counter at the start of every basic block; the machine code
that ptxas makes of the same PTX (sm_90) names for each instruction the PTX line it stands for
(``nvdisasm -gp``). From these:

    runs(PTX block)     = sum over all warps of the most often that one of its lanes came by
    runs(machine block) = median over its telling instructions of runs(their PTX line's block)
                          / machine instructions that the line became
    executed            = 32 * sum over machine blocks of runs * instructions

A warp issues an instruction whether one of its lanes needs it or all: so the lanes of a warp count
as its busiest one, and every instruction as 32. Telling instructions are those that ptxas neither
leaves out nor makes several of, except with the block they are in (loop unrolling): floating-point
operations that round, loads and stores of memory, barriers, shuffles. Predicated ones say nothing:
they are issued with their block, whatever the predicate. A block without any goes by all of its
instructions, a block without PTX lines by the one before it.

The path is what the busiest warp of the grid's last block takes, in cycles, with an SM to itself:

    path  = sum over machine blocks of runs * cycles, in the order of the listing
    cycles of a machine block: its instructions in order, each when its operands are there
            (LATENCY) and its unit is free (32 / LANES), after the block before it; of a block that
            runs repeatedly, what the second time takes

Not counted: what only divergent warps reach (``BRA.DIV``), and the subroutines for the rare cases
of divisions and roots, with the blocks that call them. Lanes that take turns in a block, one per
iteration of a loop around it, are counted once.
"""

from __future__ import annotations

import math
import pathlib
import re
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .counters import Counted, telling

WARP = 32

#: Machine opcodes by the unit that executes them, for Hopper. The rest is control flow, which only
#: takes an issue slot.
UNITS = {
    "fp32": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
    "imad": "IMAD IDP",
    "alu": "FMNMX FSETP FSEL FSET FCHK HMNMX2 HSETP2 HSET2 LOP3 SHF SHL SHR IADD3 VIADD VIADDMNMX "
    "VIMNMX VIMNMX3 IMNMX ISETP SEL PRMT LEA MOV PLOP3 P2R R2P IABS BMSK SGXT CS2R VOTE I2FP F2FP",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "xu": "MUFU F2F F2I I2F FRND POPC FLO BREV REDUX",
    "lsu": "LD ST LDG STG LDS STS LDL STL ATOM ATOMG ATOMS RED SHFL LDSM",
    "uniform": "R2UR S2UR S2R LDC B2R",
}
_UNIT_OF = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}
UNIT_NAMES = (*UNITS, "control")

#: Lanes of each unit that start in a cycle, of an SM of compute capability 9.0: "Throughput of
#: Native Arithmetic Instructions" in the CUDA C++ Best Practices Guide. Integer multiplications
#: have the heavier half of the floating-point lanes (Nsight Compute's Profiling Guide: pipelines
#: fmaheavy and fmalite). Uniform instructions: assumed as fast as integer ones. Accesses: 32 lanes
#: of 4 bytes (128 bytes of shared memory a cycle), wider ones take turns.
LANES = {"fp32": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16, "lsu": 32, "uniform": 64}
ISSUE_LANES = 128  # four schedulers of a warp each
SCHEDULERS = 4

#: Cycles until the result of an instruction can be used. Shared memory and L2 (the mean of its near
#: and its far half, 258 and 414): Luo et al., "Dissecting the NVIDIA Hopper Architecture through
#: Microbenchmarking and Multiple Level Analysis", arXiv:2501.12084, tables 3 and 4. Arithmetic:
#: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
#: arXiv:1804.06826, assumed unchanged. A fence takes one access to L2, and waits for those under
#: way; barrier, branch and uniform results are assumptions. All loads from global memory are taken
#: for hits in L2: roofline.py adds what the first ones wait for DRAM.
LATENCY = {
    "fp32": 4, "imad": 5, "alu": 4, "fp64": 8, "xu": 20, "uniform": 12, "control": 1,
    "shared": 29, "shuffle": 25, "l2": 336, "barrier": 30, "branch": 8,
}  # fmt: skip


def unit_of(opcode: str) -> str:
    """The unit that executes a machine instruction (``LDS.128``); uniform ones begin with U."""
    head = opcode.partition(".")[0]
    if head in _UNIT_OF:
        return _UNIT_OF[head]
    return "uniform" if head.startswith("U") else "control"


def slots_of(opcode: str) -> int:
    """Turns of its unit that an instruction takes: a warp's access moves 128 bytes in one."""
    if unit_of(opcode) != "lsu":
        return 1
    parts = opcode.split(".")
    return 4 if "128" in parts else 2 if "64" in parts else 1


def latency_of(opcode: str) -> str:
    """The line of LATENCY that holds for a machine instruction."""
    head = opcode.partition(".")[0]
    if head in ("LDS", "STS", "ATOMS"):
        return "shared"
    if head == "SHFL":
        return "shuffle"
    if head in ("BAR", "BRA"):
        return {"BAR": "barrier", "BRA": "branch"}[head]
    if unit_of(opcode) == "lsu" or head == "MEMBAR":
        return "l2"
    return unit_of(opcode)


# ---- machine code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """A machine instruction and the PTX line it stands for (0: none)."""

    opcode: str
    predicated: bool
    operands: str
    line: int


@dataclass
class Block:
    """A basic block of machine code."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)

    def is_over(self) -> bool:
        """Does its last instruction end it?"""
        return bool(self.instructions) and self.instructions[-1].opcode.partition(".")[0] in (
            "BRA", "EXIT", "RET", "CALL", "BRX", "KILL",
        )  # fmt: skip


_MACHINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
_MACHINE_LINE = re.compile(r'File "\.nv_debug_ptx_txt", line (\d+)')
_TARGET = re.compile(r"`\(([^)]+)\)")


def disassemble(nvdisasm: str, cubin: pathlib.Path) -> str:
    """The listing of a cubin, with PTX lines."""
    return subprocess.run(
        [nvdisasm, "-gp", "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def machine_blocks(listing: str) -> dict[str, list[Block]]:
    """The basic blocks of each kernel, in order."""
    kernels: dict[str, list[Block]] = {}
    blocks: list[Block] = []
    line = 0
    for text in listing.splitlines():
        if text.startswith(".text."):
            blocks = kernels.setdefault(text[len(".text.") :].rstrip(":"), [Block("")])
            line = 0
        elif re.match(r"^[.$\w]+:$", text):
            blocks.append(Block(text[:-1]))
        elif found := _MACHINE_LINE.search(text):
            line = int(found[1])
        elif (found := _MACHINE.match(text)) and found[2] != "NOP":
            if blocks[-1].is_over():
                blocks.append(Block(""))
            blocks[-1].instructions.append(
                Instruction(found[2], found[1] is not None, found[3], line)
            )
    return {
        name: [b for b in found if b.instructions or b.label] for name, found in kernels.items()
    }


def reached(blocks: list[Block]) -> set[int]:
    """Blocks that converged warps reach, without calls of subroutines."""
    by_label = {block.label: i for i, block in enumerate(blocks) if block.label}
    seen: set[int] = set()
    todo = [0]
    while todo:
        at = todo.pop()
        if at in seen or at >= len(blocks):
            continue
        seen.add(at)
        last = blocks[at].instructions[-1] if blocks[at].instructions else None
        kind = last.opcode.partition(".")[0] if last else ""
        if last and kind == "BRA" and not last.opcode.startswith("BRA.DIV"):
            target = _TARGET.search(last.operands)
            if target and target[1] in by_label:
                todo.append(by_label[target[1]])
            # BRA P1, `(label) has a condition of its own besides the predicate.
            if not last.predicated and last.operands.lstrip().startswith("`"):
                continue
        if last and kind in ("EXIT", "RET", "KILL") and not last.predicated:
            continue
        todo.append(at + 1)
    return seen


def tells(counted: Counted, x: Instruction) -> bool:
    """Does the machine instruction run as often as its PTX line, copies of it together?"""
    ptx = counted.line.get(x.line)
    return not x.predicated and ptx is not None and telling(ptx[0]) == x.opcode.split(".")[0]


def runs_of(blocks: list[Block], counted: Counted, counts: list[int]) -> list[float]:
    """How often each machine block of a kernel ran, by those counts of the PTX blocks."""
    live = reached(blocks)
    # A block that calls a subroutine is its rare case, and nothing else.
    live -= {i for i in live if blocks[i].instructions
             and blocks[i].instructions[-1].opcode.startswith("CALL")}  # fmt: skip
    copies = Counter(x.line for i in live for x in blocks[i].instructions if tells(counted, x))
    unrolled = defaultdict(list)
    for line, number in copies.items():
        unrolled[counted.line[line][1]].append(number)
    each = {block: count / statistics.median(unrolled.get(block, [1]))
            for block, count in enumerate(counts)}  # fmt: skip
    runs: list[float] = []
    for i, block in enumerate(blocks):
        if i not in live:
            runs.append(0.0)
            continue
        told = [counts[counted.line[x.line][1]] / copies[x.line]
                for x in block.instructions if tells(counted, x)]  # fmt: skip
        rest = [each[counted.line[x.line][1]] for x in block.instructions
                if x.line in counted.line and not x.predicated]  # fmt: skip
        before = runs[-1] if runs else 0.0
        runs.append(statistics.median(told or rest) if told or rest else before)
    return runs


# ---- the path of a block -------------------------------------------------------------------------

_REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?\b")


def registers_of(x: Instruction) -> tuple[list[str], list[str]]:
    """(written, read) registers and predicates of an instruction."""
    head, *modifiers = x.opcode.split(".")
    operands = [operand.strip() for operand in x.operands.split(",")]
    results = 0
    if head not in ("STG", "STS", "ST", "RED", "BRA", "BAR", "EXIT", "MEMBAR", "WARPSYNC"):
        # The result, with a predicate before it (shuffles, atomics) or after it (carries).
        predicates = [re.fullmatch(r"U?P[T\d]", operand) is not None for operand in operands]
        results = 1 + (predicates[:2] != [False, False] and any(predicates[:2]))
    double = head.startswith("D") and head != "DSETP"
    width = 4 if "128" in modifiers else 1
    if double or {"64", "WIDE", "F64", "S64", "U64"} & set(modifiers):
        width = 2
    written = [f"{kind}{int(number) + i}" for operand in operands[:results]
               for kind, number, _ in _REGISTER.findall(operand)
               for i in range(width if kind == "R" else 1)]  # fmt: skip
    stores = head in ("STG", "STS", "ST")
    read = [f"{kind}{int(number) + i}" for operand in operands[results:]
            for kind, number, pair in _REGISTER.findall(operand)
            for i in range(width if stores and "[" not in operand
                           else 2 if pair or head.startswith("D") else 1)]  # fmt: skip
    return written, read


class LoneWarp:
    """A warp that has an SM to itself: it issues in order, each instruction when it can.

    ``spent`` are the cycles by what was waited for; "issue" is for nothing.
    """

    def __init__(self) -> None:
        self.now = 0
        self.spent: Counter[str] = Counter()
        self._ready: dict[str, tuple[int, str]] = {}  # register -> when, after what
        self._free: dict[str, int] = {}  # unit -> when
        self._accesses = 0  # when all accesses to memory are done

    def run(self, block: Block) -> Counter[str]:
        """Cycles spent on a block of instructions."""
        before = Counter(self.spent)
        for x in block.instructions:
            self._issue(x)
        return self.spent - before

    def _wait(self, when: int, why: str) -> None:
        if when > self.now:
            self.spent[why] += when - self.now
            self.now = when

    def _issue(self, x: Instruction) -> None:
        kind, unit = latency_of(x.opcode), unit_of(x.opcode)
        written, read = registers_of(x)
        is_fence = kind == "l2" and unit != "lsu"
        waits = [self._ready[r] for r in read if r in self._ready]
        waits.append((self._free.get(unit, 0), unit))
        self._wait(*max(waits))
        if unit in LANES:
            # Each scheduler has a part of the lanes; the path to memory is the whole SM's.
            lanes = LANES[unit] / (1 if unit == "lsu" else SCHEDULERS)
            self._free[unit] = self.now + math.ceil(WARP * slots_of(x.opcode) / lanes)
        done = self.now + LATENCY[kind]
        if is_fence:
            done = max(done, self._accesses)
        self.spent["issue"] += 1
        self.now += 1
        if unit == "lsu":
            self._accesses = max(self._accesses, done)
        for r in written:
            self._ready[r] = done, kind
        if is_fence or kind in ("barrier", "branch"):
            self._wait(done, kind)


@dataclass(frozen=True)
class Path:
    """Cycles of a warp that ran through a kernel: by what it waited for, and by source line."""

    waits: dict[str, float]
    steps: dict[str, float]

    def cycles(self) -> float:
        """All of them."""
        return sum(self.waits.values())


def path_of(blocks: list[Block], counted: Counted, counts: list[int]) -> Path:
    """The path of a warp by its counts of the PTX blocks."""
    warp = LoneWarp()
    path = Path(defaultdict(float), defaultdict(float))
    step = "start"
    for block, run in zip(blocks, runs_of(blocks, counted, counts), strict=True):
        if not run:
            continue
        sources = Counter(counted.source[x.line] for x in block.instructions
                          if x.line in counted.source)  # fmt: skip
        if sources:
            step = sources.most_common(1)[0][0]
        first = warp.run(block)
        again = warp.run(block) if run > 1 else Counter[str]()
        for spent, times in ((first, min(run, 1.0)), (again, run - 1.0)):
            for why, cycles in spent.items():
                path.waits[why] += times * cycles
                path.steps[step] += times * cycles
    return path


@dataclass(frozen=True)
class Executed:
    """What a kernel's launches executed.

    Attributes:
        instructions: of 32 lanes a warp.
        units: turns of the lanes of each unit.
        path: of the busiest warp of the last block.
    """

    instructions: float
    units: dict[str, float]
    path: Path


def executed(
    listing: Mapping[str, list[Block]], counted: Counted, counts: list[int]
) -> dict[str, Executed]:
    """What each kernel of a file executed, those that never ran left out."""
    found = {}
    n = counted.blocks
    for kernel, blocks in listing.items():
        runs = runs_of(blocks, counted, counts[:n])
        if not any(runs):
            continue
        units: dict[str, float] = defaultdict(float)
        for block, run in zip(blocks, runs, strict=True):
            for x in block.instructions if run else ():
                units[unit_of(x.opcode)] += WARP * run * slots_of(x.opcode)
        paths = [
            path_of(blocks, counted, counts[at : at + n])
            for at in range(n, len(counts), n)
            if any(counts[at : at + n])
        ]
        found[kernel] = Executed(
            WARP * sum(run * len(b.instructions) for b, run in zip(blocks, runs, strict=True)),
            {unit: units[unit] for unit in UNIT_NAMES if units[unit]},
            max(paths, key=Path.cycles),
        )
    return found

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WARP = 32
WARPS = 32  # of a block, at most

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

# The machine opcode of PTX operations that become exactly one instruction.
_TELLING = {
    "add.f32": "FADD",
    "sub.f32": "FADD",
    "mul.f32": "FMUL",
    "fma.f32": "FFMA",
    "add.f64": "DADD",
    "sub.f64": "DADD",
    "mul.f64": "DMUL",
    "fma.f64": "DFMA",
    "ld.global": "LDG",
    "st.global": "STG",
    "ld.shared": "LDS",
    "st.shared": "STS",
    "atom.global": "ATOMG",
    "red.global": "RED",
    "bar": "BAR",
    "barrier": "BAR",
    "shfl": "SHFL",
}


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


def telling(ptx: str) -> str | None:
    """The machine opcode of a PTX opcode (``add.rn.f32``) that becomes exactly one instruction."""
    root, *modifiers = ptx.split(".")
    last = modifiers[-1] if root in ("add", "sub", "mul", "fma") and modifiers else ""
    space = next((m for m in modifiers if m in ("global", "shared")), "")
    return _TELLING.get(".".join(filter(None, (root, last or space))))


# ---- PTX with counters ---------------------------------------------------------------------------

_BLOCKS = "TTA_BYTES_OF_BLOCKS"  # in place of a number that is known at the end of the text
_LABEL = re.compile(r"^\s*([$\w]+):\s*$")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+\.cuh?)"', re.MULTILINE)
_LOCATION = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_INSTRUCTION = re.compile(r"^\s*(@!?%p\d+\s+)?([a-z][\w.]*)(\s[^;]*)?;")


@dataclass(frozen=True)
class Counted:
    """A PTX text with a counter for each basic block.

    Attributes:
        text: what the emulator runs. Its kernels add to the global array ``symbol``.
        symbol: 64-bit counters: for each block the runs of all warps, then those of the first warp
            of the grid's last block, of its second warp, and so on.
        blocks: the number of blocks.
        line: PTX line (from 1, of the original text) -> (opcode, block).
        source: PTX line -> the line of the .cu or .cuh file it comes from, where it is one.
    """

    text: str
    symbol: str
    blocks: int
    line: dict[int, tuple[str, int]]
    source: dict[int, str]

    def tells(self, x: Instruction) -> bool:
        """Does the machine instruction run as often as its PTX line, copies of it together?"""
        ptx = self.line.get(x.line)
        return not x.predicated and ptx is not None and telling(ptx[0]) == x.opcode.split(".")[0]


def count_blocks(text: str, symbol: str) -> Counted:
    """Counters into a PTX text.

    A thread counts in registers of its own; when it ends, its warp's lanes meet and add the
    largest of their counts to ``symbol``. All threads of a warp must end, and blocks must be whole
    warps.
    """
    out: list[str] = []
    line: dict[int, tuple[str, int]] = {}
    files = dict(_FILE.findall(text))
    origin: dict[int, str] = {}
    place = None  # (file, line) that the next instructions come from
    body: list[str] | None = None  # of the kernel that is open
    depth = first = blocks = 0  # braces; blocks before this kernel, and with it
    fresh = False  # the next instruction opens a block
    for number, source in enumerate(text.splitlines(), 1):
        depth += source.count("{") - source.count("}")
        if body is None:
            out.append(source)
            if source.strip() == "{":
                body, first, fresh = [], blocks, True
            continue
        if depth == 0:
            out += _around(body, symbol, first, blocks)
            out.append(source)
            body = None
            continue
        place = _LOCATION.match(source) or place
        found = _INSTRUCTION.match(source)
        fresh = fresh or _LABEL.match(source) is not None
        if found:
            if fresh:
                body.append(f"add.u32 %tta{blocks - first}, %tta{blocks - first}, 1;")
                blocks += 1
            opcode = found[2]
            line[number] = (opcode, blocks - 1)
            if place and place[1] in files:
                origin[number] = f"{files[place[1]]}:{place[2]}"
            fresh = opcode.partition(".")[0] in ("bra", "brx", "ret", "exit")
            if opcode in ("ret", "exit"):
                source = f"{found[1] or ''}bra $tta_end{first};"
        body.append(source)
    array = f".visible .global .align 8 .u64 {symbol}[{(1 + WARPS) * blocks}];"
    at = next(i for i, source in enumerate(out) if source.startswith(".address_size"))
    out.insert(at + 1, array)
    whole = "\n".join(out).replace(_BLOCKS, str(8 * blocks))
    return Counted(whole, symbol, blocks, line, origin)


def _around(body: list[str], symbol: str, first: int, stop: int) -> list[str]:
    """A kernel's body with its counters set to zero before it and gathered after it."""
    count = stop - first
    lines = [f".reg .b32 %tta<{count}>;", ".reg .b32 %tta_a;", ".reg .b32 %tta_b;",
             ".reg .b64 %tta_value;", ".reg .b64 %tta_at;", ".reg .pred %tta_one;",
             ".reg .pred %tta_last;"]  # fmt: skip
    lines += [f"mov.u32 %tta{block}, 0;" for block in range(count)]
    lines += body
    lines += [
        f"$tta_end{first}:",
        # One lane of a warp writes; into the second part, in the last block alone.
        "mov.u32 %tta_a, %laneid;",
        "setp.eq.u32 %tta_one, %tta_a, 0;",
        "mov.u32 %tta_a, %nctaid.x;",
        "sub.u32 %tta_a, %tta_a, 1;",
        "mov.u32 %tta_b, %ctaid.x;",
        "setp.eq.and.u32 %tta_last, %tta_a, %tta_b, %tta_one;",
        "mov.u32 %tta_a, %nctaid.y;",
        "sub.u32 %tta_a, %tta_a, 1;",
        "mov.u32 %tta_b, %ctaid.y;",
        "setp.eq.and.u32 %tta_last, %tta_a, %tta_b, %tta_last;",
        # Grids have two dimensions here, blocks one.
        "mov.u32 %tta_a, %tid.x;",
        "shr.u32 %tta_a, %tta_a, 5;",
        "add.u32 %tta_a, %tta_a, 1;",
        f"mul.wide.u32 %tta_at, %tta_a, {_BLOCKS};",
        f"mov.u64 %tta_value, {symbol};",
        "add.u64 %tta_at, %tta_at, %tta_value;",
    ]
    for block in range(count):
        lines += [
            f"redux.sync.max.u32 %tta_a, %tta{block}, 0xffffffff;",
            "cvt.u64.u32 %tta_value, %tta_a;",
            f"@%tta_one red.global.add.u64 [{symbol}+{8 * (first + block)}], %tta_value;",
            f"@%tta_last red.global.add.u64 [%tta_at+{8 * (first + block)}], %tta_value;",
        ]
    return [*lines, "ret;"]


def reader_source(counted: Iterable[Counted]) -> str:
    """A .cu file that, linked into a program, writes all counters to the file TTA_EXT_COUNTS names
    when the program ends: symbol and numbers, a line each.
    """
    arrays = [(c.symbol, (1 + WARPS) * c.blocks) for c in counted if c.blocks]
    declared = "\n".join(f'extern "C" __device__ unsigned long long {s}[{n}];' for s, n in arrays)
    defined = declared.replace('extern "C" ', "")
    calls = "\n".join(f'    write(file, "{s}", {s}, {n});' for s, n in arrays)
    return f"""#include <cstdio>
#include <cstdlib>
#include <vector>
extern "C" {{
{defined}
}}
namespace {{
template <class T>
void write(FILE* file, const char* name, const T& symbol, size_t count) {{
  std::vector<unsigned long long> values(count);
  if (cudaMemcpyFromSymbol(values.data(), symbol, 8 * count)) return;
  fputs(name, file);
  for (unsigned long long value : values) fprintf(file, " %llu", value);
  fputc('\\n', file);
}}
struct AtEnd {{
  ~AtEnd() {{
    const char* path = getenv("TTA_EXT_COUNTS");
    FILE* file = path ? fopen(path, "w") : nullptr;
    if (!file) return;
{calls}
    fclose(file);
  }}
}} at_end;
}}  // namespace
"""


def read_counts(path: pathlib.Path) -> dict[str, list[int]]:
    """What such a program wrote: symbol -> counts."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {symbol: [int(value) for value in values] for symbol, *values in lines}


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


def runs_of(blocks: list[Block], counted: Counted, counts: list[int]) -> list[float]:
    """How often each machine block of a kernel ran, by those counts of the PTX blocks."""
    live = reached(blocks)
    # A block that calls a subroutine is its rare case, and nothing else.
    live -= {i for i in live if blocks[i].instructions
             and blocks[i].instructions[-1].opcode.startswith("CALL")}  # fmt: skip
    copies = Counter(x.line for i in live for x in blocks[i].instructions if counted.tells(x))
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
                for x in block.instructions if counted.tells(x)]  # fmt: skip
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

"""Counters in PTX: how often each basic block runs, by warp (see machine_code.py)."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

WARPS = 32  # of a block, at most

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


def telling(ptx: str) -> str | None:
    """The machine opcode of a PTX opcode (``add.rn.f32``) that becomes exactly one instruction."""
    root, *modifiers = ptx.split(".")
    last = modifiers[-1] if root in ("add", "sub", "mul", "fma") and modifiers else ""
    space = next((m for m in modifiers if m in ("global", "shared")), "")
    return _TELLING.get(".".join(filter(None, (root, last or space))))

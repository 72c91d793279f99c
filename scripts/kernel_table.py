"""What nvcc makes of every CUDA kernel on four architectures, as a checked-in table.

    python scripts/kernel_table.py           compile and write benchmarks/results/kernels.json, .md
    python scripts/kernel_table.py --check   fail on a spill, on local memory, or on a stale table

Needs nvcc (found as the extension's build finds it) with its ptxas, c++filt, and cuobjdump (PATH,
``CUOBJDUMP`` or the triton package). Without cuobjdump ``--check`` compiles all the same and goes
by what ptxas reports: registers, shared memory, stack, spills. Without nvcc it compares the hash
of the sources alone.

Occupancy is theoretical: blocks of the launch bound's size that registers, static shared memory,
warps and block slots allow, as a part of the warps an SM holds. Shared memory that a launch adds
(control_update, control_merge: by the number of rollouts and shards) is not counted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from tta_ext.build import LIBRARIES, BuildError, cuda, toolchain

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "kernels.json"
TEXT = ROOT / "benchmarks" / "results" / "kernels.md"
CSRC = ROOT / "csrc"
THREADS = 256  # of a block, where a kernel sets no bound


@dataclass(frozen=True)
class Processor:
    """What one SM has (CUDA C++ Programming Guide, table of technical specifications)."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536


SM = {
    "80": Processor(warps=64, blocks=32, shared=164 * 1024),
    "90": Processor(warps=64, blocks=32, shared=228 * 1024),
    "100": Processor(warps=64, blocks=32, shared=228 * 1024),
    "120": Processor(warps=48, blocks=24, shared=100 * 1024),
}
# Registers are given to warps in groups of 256, a quarter of them in each part of the SM; shared
# memory in pieces of 128 bytes, 1 KiB of each block being the system's.
REGISTER_GROUP = 256
PARTS = 4
SHARED_PIECE = 128
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Assembled:
    """One kernel on one architecture as ptxas reports it; memory in bytes."""

    file: str
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    def fault(self) -> str:
        """What forbids the kernel, empty if nothing does."""
        spilled = self.spill_stores + self.spill_loads
        return ", ".join(
            text
            for text, bad in (
                (f"{spilled} bytes of spills", spilled),
                (f"a stack of {self.stack} bytes", self.stack),
            )
            if bad
        )


@dataclass(frozen=True)
class Kernel(Assembled):
    """The same, with what its machine code shows; counts of instructions are static."""

    threads: int
    local_accesses: int
    loads_128: int
    loads_64: int
    stores_128: int
    instructions: int
    blocks: int
    occupancy: float
    limit: str

    def fault(self) -> str:
        """What forbids the kernel, empty if nothing does."""
        accesses = f"{self.local_accesses} accesses to local memory" if self.local_accesses else ""
        return ", ".join(filter(None, (super().fault(), accesses)))


T = TypeVar("T", bound=Assembled)


def sources() -> list[Path]:
    """The .cu files of the library."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def digests() -> dict[str, str]:
    """For each .cu file the SHA-256 of what its kernels depend on: itself, all headers, flags."""
    headers = [path for path in LIBRARIES["cuda"].headers() if path.parent.name != "bind"]
    return {
        path.name: toolchain.digest_of(CSRC, (path, *headers), cuda.FLAGS) for path in sources()
    }


def tool(name: str) -> str:
    """A program of the CUDA toolkit: environment, PATH, or the triton package."""
    spec = importlib.util.find_spec("triton")
    inside = []
    if spec is not None and spec.origin:
        inside = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)]
    for path in (os.environ.get(name.upper()), shutil.which(name), *inside):
        if path and Path(path).exists():
            return path
    raise BuildError(
        f"no {name}: looked on the PATH and in the triton package; mend it with: "
        f"export {name.upper()}=<its path>, or pip install triton"
    )


def output_of(*command: str, stdin: str | None = None) -> str:
    """What a program prints; its error ends the script."""
    done = subprocess.run(command, capture_output=True, text=True, input=stdin or "")
    if done.returncode:
        sys.exit(f"kernel_table: {' '.join(command)}\n{done.stderr or done.stdout}")
    return done.stdout + done.stderr


def occupancy(arch: str, threads: int, registers: int, shared: int) -> tuple[int, float, str]:
    """(blocks an SM, part of its warps, what sets the limit)."""
    sm = SM[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_GROUP) * REGISTER_GROUP
    warps_by_registers = sm.registers // PARTS // per_warp * PARTS
    block_shared = -(-(shared + SHARED_RESERVED) // SHARED_PIECE) * SHARED_PIECE
    limits = {
        "warps": sm.warps // warps,
        "registers": warps_by_registers // warps,
        "shared": sm.shared // block_shared,
        "blocks": sm.blocks,
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limits[limit] * warps / sm.warps, limit


def readable(mangled: list[str]) -> dict[str, str]:
    """Demangled names without namespaces, arguments and nvcc's names of anonymous namespaces."""
    filtered = output_of("c++filt", stdin="\n".join(mangled)).splitlines()
    names = {}
    for name, text in zip(mangled, filtered, strict=True):
        text = re.sub(r"_GLOBAL__N__\w+::|\(anonymous namespace\)::|tta::|cuda::", "", text)
        text = text.removeprefix("void ")
        depth = 0
        for at, c in enumerate(text):  # the arguments open with the first bracket outside <>
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                text = text[:at]
                break
        names[name] = re.sub(r"\((?:int|bool|unsigned int)\)", "", text)
    return names


def instructions(sass: str) -> dict[str, Counter[str]]:
    """Opcodes of each kernel in cuobjdump's listing."""
    found: dict[str, Counter[str]] = {}
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = Counter(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
        )
    return found


def bounds(elf: str) -> dict[str, int]:
    """Threads of a block by the launch bound of each kernel that has one."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        match = re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", part
        )
        if match:
            x, y, z = (int(n, 16) for n in match.groups())
            found[part.split(None, 1)[0]] = x * y * z
    return found


def count(opcodes: Counter[str], kind: str, width: str = "") -> int:
    """Instructions of a kind (``LDG``), of a width (``128``) if one is given."""
    return sum(
        n
        for opcode, n in opcodes.items()
        if opcode.split(".")[0] == kind and (not width or width in opcode.split("."))
    )


def assemble(toolkit: cuda.Toolkit, source: Path, arch: str, cubin: Path) -> dict[str, Assembled]:
    """Compile a file for an architecture; what ptxas reports, by mangled name."""
    log = output_of(
        *toolkit.compiler.command,
        *cuda.FLAGS,
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xptxas=-v",
        "-cubin",
        f"-I{CSRC}",
        str(source),
        "-o",
        str(cubin),
    )
    parts = {part.split("'")[0]: part for part in log.split("Compiling entry function '")[1:]}
    if not parts:
        sys.exit(f"kernel_table: ptxas reports no kernel of {source.name}")
    names = readable(sorted(parts))

    def number(part: str, pattern: str) -> int:
        return int(match[1]) if (match := re.search(pattern, part)) else 0

    return {
        mangled: Assembled(
            file=source.name,
            kernel=names[mangled],
            arch=f"sm_{arch}",
            registers=number(part, r"Used (\d+) registers"),
            shared=number(part, r"(\d+) bytes smem"),
            # Of the kernel, and of what it calls.
            stack=max(
                number(part, r"(\d+) bytes stack frame"),
                number(part, r"(\d+) bytes cumulative stack size"),
            ),
            spill_stores=number(part, r"(\d+) bytes spill stores"),
            spill_loads=number(part, r"(\d+) bytes spill loads"),
        )
        for mangled, part in parts.items()
    }


def assemble_one(toolkit: cuda.Toolkit, source: Path, arch: str) -> list[Assembled]:
    """The kernels of a file on an architecture, without a look at their machine code."""
    with tempfile.TemporaryDirectory() as folder:
        return list(assemble(toolkit, source, arch, Path(folder) / "kernels.cubin").values())


def compile_one(toolkit: cuda.Toolkit, source: Path, arch: str) -> list[Kernel]:
    """The kernels of a file on an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        reports = assemble(toolkit, source, arch, cubin)
        opcodes = instructions(output_of(tool("cuobjdump"), "-sass", str(cubin)))
        threads = bounds(output_of(tool("cuobjdump"), "-elf", str(cubin)))
    if reports.keys() != opcodes.keys():
        sys.exit(f"kernel_table: ptxas and cuobjdump name other kernels of {source.name}")
    kernels = []
    for mangled, report in reports.items():
        mix = opcodes[mangled]
        size = threads.get(mangled, THREADS)
        blocks, share, limit = occupancy(arch, size, report.registers, report.shared)
        kernels.append(
            Kernel(
                **asdict(report),
                threads=size,
                local_accesses=count(mix, "LDL") + count(mix, "STL"),
                loads_128=count(mix, "LDG", "128"),
                loads_64=count(mix, "LDG", "64"),
                stores_128=count(mix, "STG", "128"),
                instructions=sum(mix.values()) - count(mix, "NOP"),
                blocks=blocks,
                occupancy=round(share, 4),
                limit=limit,
            )
        )
    return kernels


def measure(
    compile_file: Callable[[cuda.Toolkit, Path, str], list[T]],
    toolkit: cuda.Toolkit,
    files: Sequence[Path],
) -> list[T]:
    """The kernels of files on all architectures, sorted."""
    jobs = [(source, arch) for arch in cuda.ARCHITECTURES for source in files]
    with concurrent.futures.ThreadPoolExecutor(toolchain.job_count(len(jobs))) as pool:
        found = list(pool.map(lambda job: compile_file(toolkit, *job), jobs))
    return in_order(kernel for part in found for kernel in part)


def in_order(kernels: Iterable[T]) -> list[T]:
    """By file, name and architecture."""
    return sorted(kernels, key=lambda k: (k.file, k.kernel, int(k.arch[3:])))


def render(kernels: list[Kernel], compiler: str) -> str:
    """The table as Markdown."""
    lines = [
        "# CUDA kernels as compiled",
        "",
        f"Written by `scripts/kernel_table.py` with {compiler}; no GPU was involved. Flags: "
        f"`{' '.join(cuda.FLAGS)}`. No kernel may spill or use local memory.",
        "Loads and stores are counted in the machine code, whatever how often they run. Occupancy:",
        "blocks of the launch bound's threads that fit an SM by registers, static shared memory,",
        "warps and slots, as a part of its warps.",
        "",
        "| file | kernel | arch | threads | registers | shared | stack | spills | 128-bit loads "
        "| 64-bit loads | 128-bit stores | instructions | blocks/SM | occupancy | limit |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for k in kernels:
        cells = (
            k.file,
            f"`{k.kernel}`",
            k.arch,
            k.threads,
            k.registers,
            k.shared,
            k.stack,
            k.spill_stores + k.spill_loads,
            k.loads_128,
            k.loads_64,
            k.stores_128,
            k.instructions,
            k.blocks,
            f"{k.occupancy:.0%}",
            k.limit,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def recorded() -> tuple[dict[str, object], list[Kernel]]:
    """The table as it is checked in."""
    if not TABLE.exists():
        return {}, []
    record = json.loads(TABLE.read_text())
    return record, [Kernel(**kernel) for kernel in record.pop("kernels")]


def faults(kernels: Sequence[Assembled]) -> list[str]:
    """One line for each kernel that must not ship."""
    return [f"{k.file} {k.kernel} {k.arch}: {k.fault()}" for k in kernels if k.fault()]


def check(toolkit: cuda.Toolkit | None, dumps: bool = True) -> list[str]:
    """Why the checked-in table does not stand; empty if it does.

    Args:
        toolkit: what to compile with; without one the hash of the sources must do.
        dumps: cuobjdump is there, to look at the machine code too.
    """
    record, kernels = recorded()
    if record.get("sources") != digests():
        return ["benchmarks/results/kernels.json is stale: run python scripts/kernel_table.py"]
    if toolkit is None:
        return faults(kernels)
    known: Sequence[Assembled] = kernels
    found: Sequence[Assembled]
    if dumps:
        compiled = measure(compile_one, toolkit, sources())
        found = compiled
    else:
        found = measure(assemble_one, toolkit, sources())
        names = [field.name for field in fields(Assembled)]
        known = [Assembled(**{name: getattr(k, name) for name in names}) for k in kernels]
    problems = faults(found)
    # Another nvcc may use other registers; what it must not do is spill.
    if not problems and toolkit.compiler.version == record.get("compiler") and found != known:
        problems = ["benchmarks/results/kernels.json is not what nvcc gives: write it again"]
    return problems


def write(toolkit: cuda.Toolkit) -> list[Kernel]:
    """Write the table; files that have not changed since it was written keep their lines."""
    record, kernels = recorded()
    before, known = digests(), record.get("sources")
    if record.get("compiler") != toolkit.compiler.version or not isinstance(known, dict):
        known = {}
    changed = [path for path in sources() if known.get(path.name) != before[path.name]]
    kept = [k for k in kernels if before.get(k.file, "") == known.get(k.file)]
    kernels = in_order((*kept, *measure(compile_one, toolkit, changed)))
    # Of a file that changed under way, nobody knows which version was compiled.
    after = digests()
    steady = {name: text for name, text in before.items() if after.get(name) == text}
    kernels = [k for k in kernels if k.file in steady]
    for name in sorted(after.keys() - steady.keys()):
        print(f"{name} changed meanwhile; run it again")
    record = {
        "sources": steady,
        "compiler": toolkit.compiler.version,
        "kernels": [asdict(kernel) for kernel in kernels],
    }
    TABLE.write_text(json.dumps(record, indent=1) + "\n")
    TEXT.write_text(render(kernels, toolkit.compiler.version))
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in table")
    arguments = parser.parse_args()
    try:
        toolkit = cuda.find_toolkit()
    except BuildError as error:
        if not arguments.check:
            sys.exit(f"kernel_table: {error}")
        print(f"the hash of the sources alone: {error}")
        toolkit = None
    dumps = True
    try:
        tool("cuobjdump")
    except BuildError as error:
        if not arguments.check:
            sys.exit(f"kernel_table: {error}")
        if toolkit:
            print(f"by the reports of ptxas alone: {error}")
        dumps = False
    if arguments.check:
        problems = check(toolkit, dumps)
    else:
        assert toolkit is not None
        problems = faults(write(toolkit))
    for line in problems:
        print(line)
    if not problems:
        total = len({(k.file, k.kernel) for k in recorded()[1]})
        print(f"{total} kernels, none spills or uses local memory")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

"""What nvcc makes of every CUDA kernel on four architectures, as a Markdown table.

    [TTA_EXT_CUDA_VARIANT=typed,float-division] python -m tools.ptx.kernel_table [--short] [FILE.cu]

Needs nvcc (found as the extension's build finds it) with its ptxas, c++filt, and cuobjdump (PATH,
``CUOBJDUMP`` or the triton package). That no kernel spills is checked by .ci/spills.py, which needs
nvcc alone.

Occupancy is theoretical: blocks of the launch bound's size that registers, static shared memory,
warps and block slots allow, as a part of the warps an SM holds. Shared memory that a launch adds
(control_update, control_merge: by the number of rollouts and shards) is not counted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tta_ext.build import BuildError, cuda, toolchain

ROOT = Path(__file__).resolve().parent.parent.parent
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
class Kernel:
    """One kernel on one architecture; memory in bytes, counts of instructions are static."""

    file: str
    kernel: str
    arch: str
    threads: int
    registers: int
    shared: int
    stack: int
    spills: int
    local_accesses: int
    loads_128: int
    loads_64: int
    stores_128: int
    instructions: int
    blocks: int
    occupancy: float
    limit: str


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


def compile_one(toolkit: cuda.Toolkit, source: Path, arch: str) -> list[Kernel]:
    """The kernels of a file on an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        log = output_of(
            *toolkit.compiler.command,
            *cuda.FLAGS,
            *cuda.variant_flags(),
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-Xptxas=-v",
            f"-I{CSRC}",
            *("-cubin", str(source), "-o", cubin),
        )
        opcodes = instructions(output_of(tool("cuobjdump"), "-sass", cubin))
        threads = bounds(output_of(tool("cuobjdump"), "-elf", cubin))
    reports = {part.split("'")[0]: part for part in log.split("Compiling entry function '")[1:]}
    if reports.keys() != opcodes.keys():
        sys.exit(f"kernel_table: ptxas and cuobjdump name other kernels of {source.name}")
    names = readable(sorted(reports))
    kernels = []
    for mangled, report in reports.items():
        mix = opcodes[mangled]
        size = threads.get(mangled, THREADS)

        def number(pattern: str, report: str = report) -> int:
            return int(match[1]) if (match := re.search(pattern, report)) else 0

        registers, shared = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
        blocks, share, limit = occupancy(arch, size, registers, shared)
        kernels.append(
            Kernel(
                file=source.name,
                kernel=names[mangled],
                arch=f"sm_{arch}",
                threads=size,
                registers=registers,
                shared=shared,
                # Of the kernel, and of what it calls.
                stack=max(
                    number(r"(\d+) bytes stack frame"),
                    number(r"(\d+) bytes cumulative stack size"),
                ),
                spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
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
    toolkit: cuda.Toolkit,
    files: Sequence[Path],
    architectures: Sequence[str] = cuda.ARCHITECTURES,
) -> list[Kernel]:
    """The kernels of files on these architectures, by file, name and architecture."""
    jobs = [(source, arch) for arch in architectures for source in files]
    with concurrent.futures.ThreadPoolExecutor(toolchain.job_count(len(jobs))) as pool:
        parts = list(pool.map(lambda job: compile_one(toolkit, *job), jobs))
    kernels = [kernel for part in parts for kernel in part]
    return sorted(kernels, key=lambda k: (k.file, k.kernel, int(k.arch[3:])))


def _page(head: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A sentence, and a table in Markdown."""
    header, *lines = (f"| {' | '.join(row)} |" for row in (names, *rows))
    return "\n".join([head, "", header, "|" + "---|" * len(names), *lines])


def render(kernels: Sequence[Kernel], compiler: str) -> str:
    """The table as Markdown."""
    names = [field.name for field in fields(Kernel)]
    rows = ([str(getattr(k, name)) for name in names] for k in kernels)
    return _page(f"Compiled by {compiler}; no GPU was involved.", names, rows)


def summary(kernels: Sequence[Kernel], compiler: str) -> str:
    """Registers a thread / spilled bytes, a line a kernel, a column an architecture."""
    cells: dict[str, dict[str, str]] = {}
    for k in kernels:
        cells.setdefault(k.kernel, {})[k.arch] = f"{k.registers} / {k.spills}"
    names = list(dict.fromkeys(k.arch for k in kernels))
    rows = ([f"`{kernel}`", *(row[arch] for arch in names)] for kernel, row in cells.items())
    return _page(f"Registers a thread / spilled bytes, by {compiler}.", ["kernel", *names], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="those of csrc/cuda, if none is named")
    parser.add_argument("--arch", nargs="+", default=cuda.ARCHITECTURES, choices=list(SM))
    parser.add_argument("--short", action="store_true", help="registers and spilled bytes alone")
    arguments = parser.parse_args()
    try:
        toolkit = cuda.find_toolkit()
        tool("cuobjdump")
    except BuildError as error:
        sys.exit(f"kernel_table: {error}")
    files = arguments.files or sorted((CSRC / "cuda").glob("*.cu"))
    kernels = measure(toolkit, files, arguments.arch)
    print((summary if arguments.short else render)(kernels, toolkit.compiler.version))


if __name__ == "__main__":
    main()

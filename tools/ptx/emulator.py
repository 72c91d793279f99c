"""A program whose CUDA kernels run on the PTX emulator that ``TTA_EXT_PTXEMU`` names, compiled for
it and with counters of what it executes.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from tta_ext.build import BuildError, cuda, toolchain

from . import counters, machine_code
from .kernel_table import CSRC, tool

Task = TypeVar("Task")
Done = TypeVar("Done")

# How the emulator begins what it says of a launch (``PTXEMU_PROF=1``): kernel, instructions.
LAUNCH = re.compile(r"^(\S.*): (\d+) instr$", re.MULTILINE)


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
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


class Failed(Exception):
    """A program on the emulated device ended with an error."""


class Emulator:
    """A program on the emulated device, built in a folder of its own; by default kernels_test."""

    def __init__(
        self, folder: Path, kernels: Sequence[Path] = (), hosts: Sequence[Path] = ()
    ) -> None:
        """
        Raises:
            BuildError: the emulator, nvcc or nvdisasm was not found.
        """
        place = os.environ.get("TTA_EXT_PTXEMU", "")
        if not place:
            raise BuildError("TTA_EXT_PTXEMU does not name the emulator's folder")
        nvdisasm = tool("nvdisasm")
        self.nvcc = cuda.find_toolkit().compiler.command
        self.tool = folder / "ptxemu"
        # It is built where it stands, and the folder given may be read-only.
        shutil.copytree(place, self.tool, ignore=shutil.ignore_patterns("build"))
        self.tool.chmod(0o755)
        run(["make", "-s", "-C", str(self.tool)])
        self.folder = folder
        if not kernels:
            kernels = sorted((CSRC / "cuda").glob("*.cu"))
            hosts = sorted([*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "testing/cuda").glob("*.cpp")])
        sources = [*kernels, *hosts]
        objects = concurrently(self._compile, sources)
        self.ptx = [folder / path.stem / f"{path.stem}.ptx" for path in kernels]
        self.counted = {}
        self.listings = {}
        for path in self.ptx:
            counted = counters.count_blocks(path.read_text(), f"tta_counts_{path.stem}")
            self.counted[path.with_suffix(".counted.ptx")] = counted
            path.with_suffix(".counted.ptx").write_text(counted.text)
            cubin = path.with_suffix(".sm_90.cubin")
            listing = machine_code.disassemble(nvdisasm, cubin)
            self.listings[counted.symbol] = machine_code.machine_blocks(listing)
        reader = folder / "reader.cu"
        reader.write_text(counters.reader_source(self.counted.values()))
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
            counts = counters.read_counts(path)
        found: dict[str, machine_code.Executed] = {}
        for counted in self.counted.values():
            listing = self.listings[counted.symbol]
            found |= machine_code.executed(listing, counted, counts[counted.symbol])
        return found

"""What nvcc's PTX of every CUDA kernel does, executed without a GPU: checks, and a profile.

    python -m benchmarks.emulate             run both, write benchmarks/results/emulation.json
    python -m benchmarks.emulate --check     is that file of these sources, and within its bounds?

Needs nvcc and the PTX emulator whose folder ``TTA_EXT_PTXEMU`` names (without them: a sentence, and
exit code 0). csrc/testing/cuda is linked against the emulator's CUDA runtime; every family runs in
ascending, descending and random thread orders, with random switches between threads, and compares
each output with the CPU kernels bit for bit. The emulator's check of races between blocks is off:
it does not know the pattern by which the last block to arrive takes over (its README says so; the
SIMT layer in csrc/testing/simt checks that one).

The profile takes one call as decoding makes it (common_cases.cpp). The emulator counts the memory
requests of a launch's first block, which has a tile of the row; the block that arrives last looks
at one tile again, which L2 still holds. So, of the first block,

    dram_ratio = 32 bytes * sectors requested / bytes of the tile that must move

where a word that all lanes of a warp read counts once for an instruction of the block, the other
warps having it in L1. ``instructions`` are PTX instructions of all threads of all blocks, ``mix``
is that of the kernel's whole PTX, whatever of it ran.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tta_ext import _compile, _compile_cuda

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RESULT = ROOT / "benchmarks" / "results" / "emulation.json"

FAMILIES = ("deferral", "verify", "sampling", "knapsack", "prelogit", "control")
# Thread order (0 ascending, 1 descending, else random) and the probability of a switch to another
# thread at a memory access.
ORDERS = ((0, 0.0), (1, 0.0), (2, 0.01), (3, 0.1))
REPETITIONS = 3
VOCAB = 9000

PROFILE_VOCAB = 128256
DIM, ROLLOUTS, STEPS, DRAFT = 4096, 32, 32, 4  # as in common_cases.cpp
TILE = 4096  # elements of a row that a block has
SECTOR = 32
MOST_DRAM_RATIO = 1.05

# PTX instructions for an element of the input (a normal, for control_update) that a change must
# not exceed; a little above what was counted last.
MOST_INSTRUCTIONS = {
    "categorical_sample": 33.0,
    "deferral_propose": 35.0,
    "deferral_sample": 36.0,
    "deferral_sample deferred": 68.0,
    "deferral_propose knapsack": 40.0,
    "deferral_mask": 50.0,
    "deferral_mask knapsack": 180.0,
    "deferral_probs": 193.0,
    "deferral_stats": 95.0,
    "deferral_verify": 90.0,
    "implicit_reward": 32.0,
    "greedy_knapsack": 262.0,
    "prelogit_perturb": 88.0,
    "importance_weights": 1560.0,
    "control_update": 74.0,
}
# Those that read each row once: here the ratio has a bound.
ONE_PASS = ("categorical_sample", "deferral_propose", "deferral_sample", "prelogit_perturb")
# Those that count into shared memory by the data's own values: conflicts depend on the data.
HISTOGRAMS = ("deferral_mask knapsack", "greedy_knapsack")
FLOAT32_ONLY = ("greedy_knapsack", "importance_weights", "control_update")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Launch:
    """The profile of one launch; sectors and wavefronts are those of its first block."""

    kernel: str
    instructions: int
    sectors: int
    wavefronts: int
    ideal_wavefronts: int
    mix: dict[str, float]  # shares of the kernel's PTX by the unit that executes it


@dataclass(frozen=True)
class Profile:
    """An operator's common case."""

    op: str
    dtype: str
    batch: int
    elements: int
    dram_ratio: float | None  # None: several passes, or bound by arithmetic
    bank_conflicts: int  # wavefronts more than the bytes need
    instructions_per_element: float
    launches: list[Launch]


def digest() -> str:
    """SHA-256 of the kernels and of the program that runs them."""
    files = [
        path
        for folder in ("core", "cuda", "testing/cuda")
        for path in sorted((CSRC / folder).iterdir())
        if path.is_file()
    ]
    return _compile.digest_of(CSRC, files, _compile_cuda.FLAGS)


def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """A program that must succeed; what it prints comes back."""
    done = subprocess.run(list(command), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"emulate: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


class Emulator:
    """kernels_test on the emulated device, built in a folder of its own."""

    def __init__(self, tool: Path, folder: Path) -> None:
        self.tool = folder / "ptxemu"
        # It is built where it stands, and the folder given may be read-only.
        shutil.copytree(tool, self.tool, ignore=shutil.ignore_patterns("build"))
        self.tool.chmod(0o755)
        run(["make", "-s", "-C", str(self.tool)])
        self.folder = folder
        self.nvcc = _compile_cuda.find_toolkit().compiler.command
        kernels = sorted((CSRC / "cuda").glob("*.cu"))
        hosts = sorted([*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "testing/cuda").glob("*.cpp")])
        with concurrent.futures.ThreadPoolExecutor(_compile.job_count(len(hosts))) as pool:
            objects = list(pool.map(self._compile, [*kernels, *hosts]))
        self.ptx = [folder / path.stem / f"{path.stem}.ptx" for path in kernels]
        self.mix = {k: v for path in self.ptx for k, v in mixes(path.read_text()).items()}
        self.program = str(folder / "kernels_test")
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
                        "-gencode=arch=compute_90,code=compute_90"]  # fmt: skip
        else:
            command += ["-O1", "-Xcompiler=-ffp-contract=off,-fno-math-errno"]
        run(command)
        return str(target)

    def __call__(self, *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
        """kernels_test with arguments; settings are the emulator's (``seed=1`` for PTXEMU_SEED)."""
        environment = dict(os.environ, PTXEMU_PTX=":".join(map(str, self.ptx)))
        environment["PTXEMU_INTERBLOCK"] = "0"
        environment |= {f"PTXEMU_{name.upper()}": str(value) for name, value in settings.items()}
        return subprocess.run(
            [self.program, *map(str, arguments)], capture_output=True, text=True, env=environment
        )


def check_families(
    emulator: Emulator, orders: Iterable[tuple[int, float]]
) -> list[dict[str, object]]:
    """Every family in every order; the first that differs from the CPU ends the script."""
    done = []
    for seed, preempt in orders:
        for family in FAMILIES:
            result = emulator(
                family, "--repetitions", REPETITIONS, "--seed", seed + 1, "--vocab", VOCAB,
                seed=seed, preempt=preempt,
            )  # fmt: skip
            if result.returncode:
                sys.exit(
                    f"emulate: {family}, order {seed}, switches {preempt}\n"
                    f"{result.stdout[-2000:]}{result.stderr[-4000:]}"
                )
            done.append({"family": family, "order": seed, "switches": preempt, "passed": True})
            print(f"{family}: order {seed}, switches {preempt}: equal to the CPU", flush=True)
    return done


_LAUNCH = re.compile(r"^(\S.*): (\d+) instr$", re.MULTILINE)
_REQUESTS = re.compile(
    r"^(global|shared) PTX .*?: req (\d+) lanes/req [\d.]+ bytes (\d+) "
    r"(?:sectors|wavefronts) (\d+) \(ideal (\d+)\)",
    re.MULTILINE,
)
_OPCODE = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)[ \t].*;", re.MULTILINE)


def unit_of(opcode: str) -> str:
    """The unit that executes a PTX instruction: float, double, integer, memory or other."""
    kind = opcode.split(".")[0]
    if kind in ("ld", "st", "atom", "red"):
        return "memory"
    if kind in ("mov", "bra", "cvta", "bar", "barrier", "shfl", "vote", "ret", "selp"):
        return "other"
    if ".f64" in opcode:
        return "double"
    return "float" if ".f32" in opcode else "integer"


def mixes(text: str) -> dict[str, dict[str, float]]:
    """The mix of each kernel in a PTX text, by its mangled name."""
    found = {}
    for part in re.split(r"\.entry\s+", text)[1:]:
        units = [unit_of(opcode) for opcode in _OPCODE.findall(part)]
        found[part.partition("(")[0]] = {
            unit: round(units.count(unit) / len(units), 4) for unit in sorted(set(units))
        }
    return found


def read_profile(text: str, mix: dict[str, dict[str, float]]) -> list[Launch]:
    """The launches of a profile that the emulator printed."""
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
        plain = re.sub(r"^_ZN.*?\d+([a-z_]+_kernel).*$", r"\1", name)
        launches.append(Launch(plain, int(instructions), sectors, wavefronts, ideal, mix[name]))
    return launches


def elements_of(op: str) -> int:
    """Elements of an operator's input; normals, for control_update."""
    if op == "prelogit_perturb":
        return ROLLOUTS * DIM
    if op == "control_update":
        return ROLLOUTS * STEPS * DIM
    if op == "importance_weights":
        return ROLLOUTS
    return PROFILE_VOCAB * {"deferral_verify": 2 * DRAFT + 1, "implicit_reward": 3}.get(op, 1)


def profile(emulator: Emulator, op: str, dtype: str) -> Profile:
    """One call of an operator's common case."""
    result = emulator("common", op, "--vocab", PROFILE_VOCAB, "--dtype", dtype, prof=1)
    if result.returncode:
        sys.exit(f"emulate: {op}\n{result.stdout}{result.stderr[-4000:]}")
    launches = read_profile(result.stderr, emulator.mix)
    size = 4 if dtype == "float32" else 2
    tile = TILE * (2 * size + 4 if op == "prelogit_perturb" else size)
    sectors = sum(launch.sectors for launch in launches)
    elements = elements_of(op)
    return Profile(
        op=op,
        dtype=dtype,
        batch=1,
        elements=elements,
        dram_ratio=round(SECTOR * sectors / tile, 4) if op in ONE_PASS else None,
        bank_conflicts=sum(x.wavefronts - x.ideal_wavefronts for x in launches),
        instructions_per_element=round(sum(x.instructions for x in launches) / elements, 2),
        launches=launches,
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
        name = f"{p.op} {p.dtype}"
        if p.dram_ratio is not None and p.dram_ratio > MOST_DRAM_RATIO:
            found.append(f"{name}: {p.dram_ratio} of the compulsory bytes > {MOST_DRAM_RATIO}")
        if p.op not in HISTOGRAMS and p.bank_conflicts > 0:
            found.append(f"{name}: {p.bank_conflicts} wavefronts lost to bank conflicts")
        if p.instructions_per_element > MOST_INSTRUCTIONS[p.op]:
            found.append(
                f"{name}: {p.instructions_per_element} instructions an element > "
                f"{MOST_INSTRUCTIONS[p.op]}"
            )
    return found


def recorded() -> tuple[str, list[Profile]]:
    """The hash and the profiles that are checked in."""
    record = json.loads(RESULT.read_text())
    profiles = [
        Profile(**{**p, "launches": [Launch(**launch) for launch in p["launches"]]})
        for p in record["profile"]
    ]
    return record["sources"], profiles


def check() -> list[str]:
    """Why the checked-in figures do not stand; empty if they do."""
    if not RESULT.exists():
        return ["benchmarks/results/emulation.json is missing: run python -m benchmarks.emulate"]
    sources, profiles = recorded()
    if sources != digest():
        return ["benchmarks/results/emulation.json is stale: run python -m benchmarks.emulate"]
    return faults(profiles)


def show(profiles: Iterable[Profile]) -> None:
    """The table, as plain text."""
    print(f"{'operator':27}{'dtype':10}{'DRAM/least':>12}{'conflicts':>11}{'PTX/element':>13}")
    for p in profiles:
        ratio = "-" if p.dram_ratio is None else f"{p.dram_ratio:.3f}"
        print(
            f"{p.op:27}{p.dtype:10}{ratio:>12}{p.bank_conflicts:>11}"
            f"{p.instructions_per_element:>13}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="look at the checked-in figures only")
    parser.add_argument("--profile-only", action="store_true", help="leave the orders out")
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the figures")
    arguments = parser.parse_args()
    if arguments.check:
        problems = check()
    else:
        tool = os.environ.get("TTA_EXT_PTXEMU", "")
        if not tool:
            print("emulate: skipped, TTA_EXT_PTXEMU does not name the emulator's folder")
            return 0
        try:
            _compile_cuda.find_toolkit()
        except _compile.BuildError as error:
            print(f"emulate: skipped, {error}")
            return 0
        before = digest()
        with tempfile.TemporaryDirectory() as folder:
            emulator = Emulator(Path(tool), Path(folder))
            if digest() != before:
                sys.exit("emulate: the sources changed while they were compiled")
            ran = [] if arguments.profile_only else check_families(emulator, ORDERS)
            profiles = [profile(emulator, op, dtype) for op, dtype in cases()]
        record = {
            "sources": before,
            "vocab": PROFILE_VOCAB,
            "checks": ran,
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

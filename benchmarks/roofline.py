"""How long the CUDA kernels should take on GPUs that were not there to measure: *predicted* times.

    python -m benchmarks.roofline                table of H100, all figures to results/roofline.json
    python -m benchmarks.roofline --gpu A100     another table
    python -m benchmarks.roofline --check        are those figures of these sources, within bounds?

Instructions come from benchmarks/results/emulation.json (nvcc's PTX, executed; a PTX instruction
counts as one machine instruction), bytes from the formulas below, which are those at the head of
each .cu file. With B rows of V elements of s bytes, all times in seconds:

    blocks = rows * tiles of 4096          busy = min(SMs, blocks)
    memory = bytes / (0.9 * DRAM)          at most 64 bytes a clock and busy SM
           + again / (32 bytes * clock * SMs)     what is read again, while it fits L2; else DRAM
    unit   = instructions * share / (0.8 * lanes of the unit * clock * busy),  for float, integer,
             double and for the issue of all of them (128 lanes)
    time   = first launch + (launches - 1) * next launch + stages * latency + max(memory, units)
    least  = first launch + bytes / (0.9 * DRAM):  a kernel that only moves the bytes
    ratio  = time / least

A stage is a launch in which the last block of a row to arrive goes on alone: a fence, a counter,
the tiles' sums and mostly one tile again, one after the other. The four constants and the two
efficiencies are assumptions, written below; nothing here was measured on a GPU
(benchmarks/gpu_check.sh prints measured times beside these).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import emulate

RESULT = Path(__file__).resolve().parent / "results" / "roofline.json"

# Assumptions.
FIRST_LAUNCH = 2.0e-6  # a kernel of a CUDA graph with nothing in it, start to end
NEXT_LAUNCH = 1.3e-6  # one more that depends on it
LATENCY = 2.0e-6  # of a stage
DRAM_EFFICIENCY = 0.9  # of the data sheet's bandwidth
ISSUE_EFFICIENCY = 0.8  # of the cycles
ISSUE_LANES = 128  # of an SM: four warp schedulers


@dataclass(frozen=True)
class Gpu:
    """Data sheets, and the CUDA programming guide's table of arithmetic throughput."""

    name: str
    sms: int
    clock: float  # boost, 1/s
    dram: float  # bytes/s
    l2: int  # bytes
    lanes: dict[str, int]  # results a clock and SM


GPUS = {
    "A100": Gpu("A100 SXM 80GB", 108, 1.410e9, 2.039e12, 40 << 20,
                {"float": 64, "integer": 64, "double": 32}),
    "H100": Gpu("H100 SXM", 132, 1.980e9, 3.350e12, 50 << 20,
                {"float": 128, "integer": 64, "double": 64}),
    "H200": Gpu("H200 SXM", 132, 1.980e9, 4.800e12, 50 << 20,
                {"float": 128, "integer": 64, "double": 64}),
    "B200": Gpu("B200", 148, 1.965e9, 8.000e12, 126 << 20,
                {"float": 128, "integer": 64, "double": 64}),
}  # fmt: skip

SIZES = {"float32": 4, "bfloat16": 2}
BATCHES = (1, 8, 64)
VOCABULARIES = (32000, 128256, 256000)
DIMENSIONS = (2048, 4096, 8192)
ROLLOUTS, STEPS, DRAFT = emulate.ROLLOUTS, emulate.STEPS, emulate.DRAFT

# What the gate looks at.
GATED_OPS = ("categorical_sample", "deferral_propose", "deferral_sample")
GATED_GPU, GATED_BATCH, GATED_VOCAB, GATED_DTYPE = "H100", 64, 128256, "float32"
MOST_RATIO = 1.3


@dataclass(frozen=True)
class Op:
    """Traffic of an operator.

    Attributes:
        bytes: (elements of a row, bytes of an element) -> bytes a row that must move.
        formula: the same in words, for the table.
        again: bytes a row that later passes read once more.
        stages: launches that end with a block going on alone.
        models: rows of logits that a row of the batch has blocks for in its first launch.
    """

    bytes: Callable[[int, int], float]
    formula: str
    stages: int
    again: Callable[[int, int], float] = lambda v, s: 0.0
    models: int = 1


LOGITS = {
    "categorical_sample": Op(lambda v, s: s * v, "s V", 1),
    "deferral_propose": Op(lambda v, s: s * v, "s V", 1),
    "deferral_sample": Op(lambda v, s: s * v, "s V", 1),
    "deferral_sample deferred": Op(lambda v, s: 2 * s * v, "2 s V", 2),
    "deferral_propose knapsack": Op(lambda v, s: s * v, "s V", 2, lambda v, s: s * v),
    "deferral_mask": Op(lambda v, s: s * v + v, "s V + V", 1, lambda v, s: s * v),
    "deferral_mask knapsack": Op(lambda v, s: s * v + v, "s V + V", 3, lambda v, s: 3 * s * v),
    "deferral_probs": Op(lambda v, s: 2 * s * v + 4 * v, "2 s V + 4 V", 2,
                         lambda v, s: 3 * s * v, models=2),
    "deferral_stats": Op(lambda v, s: s * v, "s V", 3, lambda v, s: 2 * s * v),
    "deferral_verify": Op(lambda v, s: (2 * DRAFT + 1) * s * v, "(2 K + 1) s V", 3,
                          lambda v, s: (2 * DRAFT + 1) * s * v, models=2 * DRAFT + 1),
    "implicit_reward": Op(lambda v, s: 3 * s * v, "(1 + 2 E) s V", 1, models=3),
    "greedy_knapsack": Op(lambda v, s: 9 * v, "8 V + V", 4, lambda v, s: 24 * v),
}  # fmt: skip
# Rows of `dim` elements: of hidden states, or of one step of one prompt.
DIMENSIONAL = {
    "prelogit_perturb": Op(lambda d, s: d * (2 * s + 4), "d (2 s + 4)", 0),
    "control_update": Op(lambda d, s: 8 * d, "8 d", 0),
}


@dataclass(frozen=True)
class Prediction:
    """A line of the table. ``time`` and ``least`` in microseconds, predicted.

    ``instructions_allowed`` are those an element for which the ratio would be ``MOST_RATIO``, all
    else as it is; ``bound`` names what takes longest: memory, issue, float, integer, double, or
    launches (with the latency of stages).
    """

    gpu: str
    op: str
    dtype: str
    rows: int
    columns: int
    bytes: int
    launches: int
    instructions_per_element: float
    bound: str
    time: float
    least: float
    ratio: float
    instructions_allowed: float


def op_of(name: str) -> Op:
    """The traffic of an operator."""
    return LOGITS.get(name) or DIMENSIONAL[name]


def shares(profile: emulate.Profile) -> dict[str, float]:
    """Shares of the instructions by unit, launches weighted by what they execute."""
    total = sum(launch.instructions for launch in profile.launches)
    units = {unit for launch in profile.launches for unit in launch.mix}
    return {
        unit: sum(x.instructions * x.mix.get(unit, 0.0) for x in profile.launches) / total
        for unit in units
    }


def base_elements(op: str) -> int:
    """Rows times columns of the call that was profiled, as ``predict`` counts them."""
    if op == "prelogit_perturb":
        return ROLLOUTS * emulate.DIM
    if op == "control_update":
        return STEPS * emulate.DIM
    return emulate.PROFILE_VOCAB


def predict(gpu: Gpu, profile: emulate.Profile, rows: int, columns: int) -> Prediction:
    """The model at the head of this file."""
    op = op_of(profile.op)
    size = SIZES[profile.dtype]
    total = sum(launch.instructions for launch in profile.launches)
    instructions = total / base_elements(profile.op) * rows * columns
    size_in_bytes = op.bytes(columns, size) * rows
    again = op.again(columns, size) * rows
    busy = min(gpu.sms, rows * op.models * -(-columns // emulate.TILE))
    if profile.op == "control_update":  # a warp or more for 128 dimensions
        busy = min(gpu.sms, -(-rows * columns // 512))
    dram = DRAM_EFFICIENCY * gpu.dram
    memory = size_in_bytes / min(dram, 64 * gpu.clock * busy)
    fits = size_in_bytes <= gpu.l2
    memory += again / (32 * gpu.clock * busy if fits else dram)
    cycle = 1 / (ISSUE_EFFICIENCY * gpu.clock * busy)
    share = shares(profile)
    units = {unit: instructions * share.get(unit, 0.0) / lanes * cycle
             for unit, lanes in gpu.lanes.items()}  # fmt: skip
    units["issue"] = instructions / ISSUE_LANES * cycle
    launches = len(profile.launches)
    fixed = FIRST_LAUNCH + (launches - 1) * NEXT_LAUNCH + op.stages * LATENCY
    work = max(memory, *units.values())
    least = FIRST_LAUNCH + size_in_bytes / dram
    bound = max({**units, "memory": memory, "launches": fixed}.items(), key=lambda x: x[1])[0]
    slowest = max(units.values())
    room = max(MOST_RATIO * least - fixed, 0.0) / slowest
    return Prediction(
        gpu=gpu.name,
        op=profile.op,
        dtype=profile.dtype,
        rows=rows,
        columns=columns,
        bytes=round(size_in_bytes),
        launches=launches,
        instructions_per_element=profile.instructions_per_element,
        bound=bound,
        time=round(1e6 * (fixed + work), 2),
        least=round(1e6 * least, 2),
        ratio=round((fixed + work) / least, 3),
        instructions_allowed=round(profile.instructions_per_element * room, 1),
    )


def predictions() -> list[Prediction]:
    """Every GPU, operator, dtype and shape."""
    found = []
    for gpu in GPUS.values():
        for p in emulate.recorded()[1]:
            if p.op in LOGITS:
                shapes = [(b, v) for b in BATCHES for v in VOCABULARIES]
            elif p.op in DIMENSIONAL:
                rows = ROLLOUTS if p.op == "prelogit_perturb" else STEPS
                shapes = [(b * rows, d) for b in BATCHES for d in DIMENSIONS]
            else:
                continue  # importance_weights: a few kilobytes, launch and latency
            found += [predict(gpu, p, rows, columns) for rows, columns in shapes]
    return found


def gated(found: Iterable[Prediction], dtype: str = GATED_DTYPE) -> list[Prediction]:
    """The lines that the gate looks at."""
    return [
        p
        for p in found
        if p.gpu == GPUS[GATED_GPU].name
        and p.op in GATED_OPS
        and (p.rows, p.columns, p.dtype) == (GATED_BATCH, GATED_VOCAB, dtype)
    ]


def faults(found: Iterable[Prediction]) -> list[str]:
    """What the gate does not let pass, a line each."""
    return [
        f"{p.op} {p.dtype} on {p.gpu}: predicted {p.time} us, {p.ratio} times the bytes' "
        f"{p.least} us > {MOST_RATIO}; {p.instructions_allowed} instructions an element would do"
        for p in gated(found)
        if p.ratio > MOST_RATIO
    ]


def document(found: Iterable[Prediction]) -> str:
    """What is written down: the model's constants and its figures, a line each."""
    head = {
        "status": "predicted, not measured",
        "sources": emulate.recorded()[0],
        "assumptions": {
            "first_launch_us": 1e6 * FIRST_LAUNCH,
            "next_launch_us": 1e6 * NEXT_LAUNCH,
            "stage_latency_us": 1e6 * LATENCY,
            "dram_efficiency": DRAM_EFFICIENCY,
            "issue_efficiency": ISSUE_EFFICIENCY,
        },
        "gpus": [asdict(gpu) for gpu in GPUS.values()],
        "columns": [field.name for field in fields(Prediction)],
    }
    lines = ",\n  ".join(json.dumps(list(asdict(p).values())) for p in found)
    return json.dumps(head, indent=1)[:-2] + f',\n "predicted": [\n  {lines}\n ]\n}}\n'


def recorded() -> list[Prediction]:
    """The figures that are checked in."""
    return [Prediction(*line) for line in json.loads(RESULT.read_text())["predicted"]]


def check() -> list[str]:
    """Why the checked-in figures do not stand; empty if they do."""
    found = predictions()
    problems = emulate.check() + faults(found)
    if not RESULT.exists() or RESULT.read_text() != document(found):
        problems.append(
            "benchmarks/results/roofline.json is stale: run python -m benchmarks.roofline"
        )
    return problems


def show(found: Iterable[Prediction], gpu: Gpu) -> None:
    """The table of a GPU, as plain text."""
    print(f"{gpu.name}: times in us, predicted, not measured")
    print(
        f"{'operator':27}{'dtype':10}{'rows':>6}{'columns':>9}{'bytes':>11}  {'a row':14}"
        f"{'launches':>9}{'PTX/el':>8}{'bound':>10}{'time':>9}{'least':>9}{'ratio':>7}"
    )
    for p in found:
        if p.gpu == gpu.name:
            print(
                f"{p.op:27}{p.dtype:10}{p.rows:>6}{p.columns:>9}{p.bytes:>11}"
                f"  {op_of(p.op).formula:14}{p.launches:>9}{p.instructions_per_element:>8.1f}"
                f"{p.bound:>10}{p.time:>9.2f}{p.least:>9.2f}{p.ratio:>7.2f}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in figures")
    parser.add_argument("--gpu", choices=GPUS, default=GATED_GPU, help="whose table to print")
    arguments = parser.parse_args()
    if arguments.check:
        problems = check()
    else:
        found = predictions()
        RESULT.write_text(document(found))
        show(found, GPUS[arguments.gpu])
        problems = faults(found)
    for line in problems:
        print(line)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

"""How long the CUDA kernels should take on GPUs that were not there to measure: *predicted* times.

    python -m benchmarks.roofline                table of H100, all figures to results/roofline.json
    python -m benchmarks.roofline --gpu A100     another table
    python -m benchmarks.roofline --check        are those figures of these sources, within bounds?
    python -m benchmarks.roofline --bounds       print NO_WORSE as those figures would have it

Instructions and paths come from benchmarks/results/emulation.json (nvcc's machine code for sm_90,
counted by machine_code.py; other GPUs are taken to execute as many), bytes from the formulas below,
which are those at the head of each .cu file. With B rows of V elements of s bytes, all times in
seconds:

    blocks = rows * tiles of 4096          busy = min(SMs, blocks)
    span   = rows * tiles / (3 * SMs), as 1, 2 or 4: tiles that a block takes where rows are shared
             (csrc/cuda/launch.h); the noise's kernels: how far blocks are from the most that a few
             rows have. Turns were counted with 1 and with 4; 2 is taken to cost as much as 1
    memory = bytes / (efficiency * DRAM)   at most 64 bytes a clock and busy SM
           + again / (32 bytes * clock * SMs)     what is read again, while it fits L2; else DRAM
    unit   = turns / (0.8 * lanes of the unit * clock * busy),  for fp32 (which integer
             multiplications take too), imad, alu, fp64, xu, lsu, uniform, and for the issue of all
    stream = max(memory, units)
    path   = for each launch, the cycles of a block with an SM to itself / clock:
             the path at LONG tiles + (tiles - LONG) * path per tile
    fill   = what the first loads wait for DRAM, beyond the wait for L2 that is in the path
    time   = first launch + (launches - 1) * next launch + fill + stream + path
    least  = first launch + DRAM latency + bytes / (efficiency * DRAM):  a kernel that only moves
             the bytes
    ratio  = time / least                  strict = time / (bytes / (efficiency * DRAM))
    flow   = (time - path) / least:  what bytes, instructions and launches alone make of it
    moved  = the same beside a kernel that also moves ``again``: flow, for operators of one pass

A path is what is left of a launch when the last bytes have arrived: its last block takes its
tile's maximum, exponentials and sum, counts itself in, and where it is the last of its row reads
the tiles' sums from L2, adds them up in float64 one after the other, chooses a tile, reads it
again, and draws. All of that is dependent steps of a few warps, listed with the cycles each waits
for in emulation.json (``path``: L2, shuffles, barriers, float64, ...). It is exposed once a launch:
the other rows' paths are beside the stream of rows that come later, as are the other tiles of a
block that takes several one after another. Where tiles have a warp each, or blocks few warps
(A_WARP_EACH), it is the path of such a block.

That as many blocks are resident as it takes to keep memory or a unit busy is taken for granted:
the occupancy is in kernels.md. Nothing here was measured on a GPU; benchmarks/gpu_times.py prints
measured times beside these.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import emulate, machine_code

RESULT = Path(__file__).resolve().parent / "results" / "roofline.json"

# Assumptions, each with what it rests on.
#
# A graph of one empty kernel, start to end.
FIRST_LAUNCH = 2.0e-6
# One more kernel that depends on it: the grid before it drains and its writes become visible. Nodes
# that do nothing take 0.6 us (github.com/ahrefs/ocannl, issue 488, sm_120); what "Getting Started
# with CUDA Graphs" (NVIDIA's technical blog) leaves between kernels of a graph is 0.5 us (V100).
# Twice that, for a drain.
NEXT_LAUNCH = 1.3e-6
# Of the cycles of a unit: what Nsight Compute's rules call a unit that is fully used begins at 80%.
ISSUE_EFFICIENCY = 0.8
# From L2 to an SM: 4472 bytes a clock on an H800 of 114 SMs are 39 each (Luo et al.,
# arXiv:2501.12084, table 5); the next smaller power of two. A sector fits a port of 64 bytes twice.
L2_BYTES, PORT_BYTES = 32, 64
# Cycles to DRAM, and to L2 (machine_code.LATENCY); Luo et al., table 3.
DRAM_LATENCY = 656


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        sms, l2: data sheet; L2 in bytes.
        clock: boost, 1/s; the data sheet's float32 peak is 2 * sms * lanes of fp32 * clock.
        dram: bytes/s, data sheet.
        efficiency: of that, what a kernel that only reads gets.
        lanes: results a clock and SM ("Throughput of Native Arithmetic Instructions", CUDA C++
            Best Practices Guide), of the units that machine_code.py names.
    """

    name: str
    sms: int
    clock: float
    dram: float
    efficiency: float
    l2: int
    lanes: dict[str, int]


# Efficiency: 0.91 was measured on an H800 (Luo et al., table 5), 6.75 TB/s on a B200
# ("Reverse-engineered Blackwell: what microbenchmark papers have measured"); A100 and H200 as H100.
GPUS = {
    "A100": Gpu("A100 SXM 80GB", 108, 1.410e9, 2.039e12, 0.9, 40 << 20,
                {**machine_code.LANES, "fp32": 64, "fp64": 32}),
    "H100": Gpu("H100 SXM", 132, 1.980e9, 3.350e12, 0.9, 50 << 20, machine_code.LANES),
    "H200": Gpu("H200 SXM", 132, 1.980e9, 4.800e12, 0.9, 50 << 20, machine_code.LANES),
    "B200": Gpu("B200", 148, 1.965e9, 8.000e12, 0.84, 126 << 20, machine_code.LANES),
}  # fmt: skip

SIZES = {"float32": 4, "bfloat16": 2}
BATCHES = (1, 8, 64)
VOCABULARIES = (32000, 128256, 256000)
DIMENSIONS = (2048, 4096, 8192)
ROLLOUTS, STEPS = emulate.ROLLOUTS, emulate.STEPS
DRAFT, SHARDS = emulate.DRAFT, emulate.SHARDS
BLOCKS_EACH = 3  # of a multiprocessor before blocks take several tiles (csrc/bind/cuda.cpp)

# The gate: on this GPU, at these sizes, no operator but NOT_GATED takes more than MOST_RATIO of the
# time of the bytes that it moves (``moved``).
GATED_GPU, GATED_BATCH = "H100", 64
GATED_VOCABULARIES, GATED_DIMENSIONS = (128256, 256000), (4096, 8192)
MOST_RATIO = 1.3
# control_update makes a normal for 4 / n bytes: arithmetic, whatever the kernel.
NOT_GATED = (("control_update", "float32"),)
# No operator must become worse: the ratio, path and all, on that GPU at the first of those columns,
# SLACK times what it was last (--bounds).
SLACK = 1.03
NO_WORSE = {
    ("categorical_sample", "float32"): 1.28,
    ("categorical_sample", "bfloat16"): 1.63,
    ("deferral_propose", "float32"): 1.33,
    ("deferral_propose", "bfloat16"): 1.74,
    ("deferral_sample", "float32"): 1.45,
    ("deferral_sample", "bfloat16"): 1.95,
    ("deferral_sample deferred", "float32"): 1.4,
    ("deferral_sample deferred", "bfloat16"): 1.93,
    ("deferral_propose greedy", "float32"): 2.03,
    ("deferral_propose greedy", "bfloat16"): 2.6,
    ("deferral_sample greedy", "float32"): 2.45,
    ("deferral_sample greedy", "bfloat16"): 2.3,
    ("deferral_propose knapsack", "float32"): 2.02,
    ("deferral_propose knapsack", "bfloat16"): 2.64,
    ("deferral_mask", "float32"): 1.67,
    ("deferral_mask", "bfloat16"): 2.15,
    ("deferral_mask knapsack", "float32"): 3.1,
    ("deferral_mask knapsack", "bfloat16"): 4.74,
    ("deferral_probs", "float32"): 2.36,
    ("deferral_probs", "bfloat16"): 2.46,
    ("deferral_stats", "float32"): 2.01,
    ("deferral_stats", "bfloat16"): 3.04,
    ("deferral_verify", "float32"): 1.28,
    ("deferral_verify", "bfloat16"): 1.52,
    ("deferral_verify mass", "float32"): 1.75,
    ("deferral_verify mass", "bfloat16"): 1.89,
    ("deferral_verify unrelated", "float32"): 1.87,
    ("deferral_verify unrelated", "bfloat16"): 2.02,
    ("implicit_reward", "float32"): 1.18,
    ("implicit_reward", "bfloat16"): 1.3,
    ("implicit_reward_probs", "float32"): 1.9,
    ("implicit_reward_probs", "bfloat16"): 1.81,
    ("greedy_knapsack", "float32"): 4.5,
    ("prelogit_perturb", "float32"): 1.18,
    ("prelogit_perturb", "bfloat16"): 1.54,
    ("importance_weights", "float32"): 2.01,
    ("control_update", "float32"): 19.7,
    ("control_merge", "float32"): 1.04,
    ("normal", "float32"): 1.23,
    ("philox", "float32"): 1.03,
}


@dataclass(frozen=True)
class Op:
    """Traffic of an operator.

    Attributes:
        bytes: (elements of a row, bytes of an element) -> bytes a row that must move.
        formula: the same in words, for the table.
        again: bytes a row that are read once more.
        models: rows of logits that a row of the batch has blocks for in its first launch.
        positions: rows that a row of the batch stands for when tiles are shared.
    """

    bytes: Callable[[int, int], float]
    formula: str
    again: Callable[[int, int], float] = lambda v, s: 0.0
    models: int = 1
    positions: int = 1


def verify_op(again: int) -> Op:
    """deferral_verify, which reads ``again`` rows of a batch row's 2 K + 1 once more."""
    read = 2 * DRAFT + 1
    return Op(
        lambda v, s: read * s * v,
        "(2 K + 1) s V",
        lambda v, s: again * s * v,
        models=read,
        positions=DRAFT + 1,
    )


LOGITS = {
    "categorical_sample": Op(lambda v, s: s * v, "s V"),
    "deferral_propose": Op(lambda v, s: s * v, "s V"),
    "deferral_propose greedy": Op(lambda v, s: s * v, "s V", lambda v, s: s * v),
    "deferral_sample": Op(lambda v, s: s * v, "s V"),
    "deferral_sample greedy": Op(lambda v, s: 2 * s * v, "2 s V", lambda v, s: 2 * s * v, models=2),
    "deferral_sample deferred": Op(lambda v, s: 2 * s * v, "2 s V"),
    "deferral_propose knapsack": Op(lambda v, s: s * v, "s V", lambda v, s: s * v),
    "deferral_mask": Op(lambda v, s: s * v + v, "s V + V", lambda v, s: s * v),
    "deferral_mask knapsack": Op(lambda v, s: s * v + v, "s V + V", lambda v, s: 3 * s * v),
    "deferral_probs": Op(lambda v, s: 2 * s * v + 4 * v, "2 s V + 4 V",
                         lambda v, s: 3 * s * v, models=2),
    "deferral_stats": Op(lambda v, s: s * v, "s V", lambda v, s: s * v),
    # A position in doubt has its mass added up; all of them, where masses are returned; of models
    # that have nothing in common every drafted one, and the rejected one's rows give the residual.
    "deferral_verify": verify_op(1),
    "deferral_verify mass": verify_op(DRAFT + 1),
    "deferral_verify unrelated": verify_op(DRAFT + 2),
    "implicit_reward": Op(lambda v, s: 3 * s * v, "(1 + 2 E) s V", models=3),
    "implicit_reward_probs": Op(lambda v, s: 3 * s * v + 4 * v, "(1 + 2 E) s V + 4 V",
                                lambda v, s: 3 * s * v, models=3),
    "greedy_knapsack": Op(lambda v, s: 9 * v, "8 V + V", lambda v, s: 24 * v),
}  # fmt: skip
# Rows of `dim` elements: of hidden states, or of one step of one prompt; of a block of Philox's
# words each. importance_weights: of one rollout each.
DIMENSIONAL = {
    # The mean's row serves all rollouts of its prompt, from L2 and beside the stream.
    "prelogit_perturb": Op(lambda d, s: d * (2 * s + 4 / ROLLOUTS), "d (2 s + 4 / n)"),
    "control_update": Op(lambda d, s: 8 * d, "8 d"),
    "control_merge": Op(lambda d, s: 4 * (SHARDS + 2) * d, "4 (S + 2) d"),
    "normal": Op(lambda d, s: 4 * d, "4 d"),
    "philox": Op(lambda d, s: 64 * d, "64 d"),
    "importance_weights": Op(lambda n, s: 16 * n + 4, "16 n + 4"),
}  # fmt: skip


# Kernels whose blocks have a warp for each tile of 16-bit elements, or few warps where they are
# plenty.
A_WARP_EACH = (
    "draw_kernel",
    "replace_kernel",
    "resolve_kernel",
    "statistics_kernel",
    "masses_kernel",
    "mask_kernel",
    "cut_histogram_kernel",
    "cut_collect_kernel",
    "prelogit_perturb_kernel",
    "normal_kernel",
)
# Elements that a block has, of operators without tiles. control_update: a warp or more for 128.
BLOCK_ELEMENTS = {"control_update": 512, "control_merge": 512, "normal": 512, "philox": 256}


@dataclass(frozen=True)
class Prediction:
    """A line of the table. ``time``, ``path`` and ``least`` in microseconds, predicted.

    ``instructions_allowed`` are those an element for which ``moved`` would be ``MOST_RATIO``;
    ``path_allowed`` is the path for which the ratio would, if memory set the pace. ``bound`` names
    what takes longest: memory, issue, a unit, or latency (launches, paths).
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
    path: float
    time: float
    least: float
    flow: float
    moved: float
    ratio: float
    ratio_strict: float
    instructions_allowed: float
    path_allowed: float


def op_of(name: str) -> Op:
    """The traffic of an operator."""
    return LOGITS.get(name) or DIMENSIONAL[name]


def rows_of(op: str) -> int:
    """Rows that an operator of DIMENSIONAL has for each of the batch."""
    return {"prelogit_perturb": ROLLOUTS, "importance_weights": 1}.get(op, STEPS)


def base_elements(op: str) -> int:
    """Rows times columns of the call that was profiled, as ``predict`` counts them."""
    if op == "importance_weights":
        return ROLLOUTS
    return rows_of(op) * emulate.DIM if op in DIMENSIONAL else emulate.PROFILE_VOCAB


def span_of(gpu: Gpu, op: str, rows: int, columns: int) -> int:
    """Tiles that a block takes (span_of in csrc/cuda/launch.h), or what stands for them."""
    width = BLOCKS_EACH * gpu.sms
    tiles = -(-columns // emulate.TILE)
    if op == "prelogit_perturb":  # warps_of in csrc/cuda/prelogit.cu
        warps = 8
        while warps > 2 and rows * tiles * warps >= 16 * width:
            warps //= 2
        return 8 // warps
    if op == "normal":  # blocks of 64 threads with two Philox blocks each
        spare = -(-rows * columns // 512) // width
    else:
        spare = rows * op_of(op).positions * tiles // width
    return emulate.SPAN if spare >= emulate.SPAN else 2 if spare >= 2 else 1


@dataclass(frozen=True)
class Work:
    """Machine instructions, and turns of the units, of the call that was profiled."""

    instructions: float
    units: dict[str, float]


def machine_of(profile: emulate.Profile, span: int) -> list[emulate.Machine]:
    """The kernels as blocks with so many tiles have them."""
    most = profile.spanned if span == emulate.SPAN else None
    return (most or profile.one).machine


def work_of(profile: emulate.Profile, span: int) -> Work:
    """With so many tiles a block."""
    units: Counter[str] = Counter()
    machine = machine_of(profile, span)
    for kernel in machine:
        units.update(kernel.units)
    return Work(sum(kernel.instructions for kernel in machine), dict(units))


def unit_times(gpu: Gpu, work: Work, factor: float, busy: int) -> dict[str, float]:
    """Seconds that each unit, and the issue of instructions, is busy with so much of the work."""
    turns = Counter(work.units)
    turns["fp32"] += turns["imad"]
    cycles = {unit: turns[unit] / lanes for unit, lanes in gpu.lanes.items()}
    cycles["issue"] = work.instructions / machine_code.ISSUE_LANES
    return {unit: factor * n / (ISSUE_EFFICIENCY * gpu.clock * busy) for unit, n in cycles.items()}


def paths_of(profile: emulate.Profile, span: int) -> list[emulate.Machine]:
    """The kernels as the paths of blocks with so many tiles are seen: of tiles that follow each
    other that of the last one, but of tiles that have a warp each the warp's.
    """
    mixture, wide = profile.op.startswith("implicit_reward"), profile.dtype == "float32"
    several = {
        kernel.kernel: kernel
        for kernel in machine_of(profile, span)
        if kernel.kernel in A_WARP_EACH and not (profile.op in LOGITS and (mixture or wide))
    }
    return [several.get(kernel.kernel, kernel) for kernel in profile.one.machine]


def path_time(gpu: Gpu, profile: emulate.Profile, columns: int, span: int = 1) -> float:
    """Seconds of the paths of all launches, with so many tiles a block."""
    tiles = -(-columns // emulate.TILE)
    return (
        sum(
            kernel.launches
            * max(sum(kernel.path.values()) + (tiles - emulate.LONG) * kernel.path_per_tile, 0.0)
            for kernel in paths_of(profile, span)
        )
        / gpu.clock
    )


def memory_time(gpu: Gpu, size: float, again: float, busy: int) -> float:
    """Seconds to move ``size`` bytes, and ``again`` once more."""
    dram = gpu.efficiency * gpu.dram
    rest = again / (L2_BYTES * gpu.clock * busy if size <= gpu.l2 else dram)
    return size / min(dram, PORT_BYTES * gpu.clock * busy) + rest


def predict(gpu: Gpu, profile: emulate.Profile, rows: int, columns: int) -> Prediction:
    """The model at the head of this file."""
    op = op_of(profile.op)
    size = op.bytes(columns, SIZES[profile.dtype]) * rows
    again = op.again(columns, SIZES[profile.dtype]) * rows
    busy = min(gpu.sms, rows * op.models * -(-columns // emulate.TILE))
    if profile.op in BLOCK_ELEMENTS:
        busy = min(gpu.sms, -(-rows * columns // BLOCK_ELEMENTS[profile.op]))
    memory = memory_time(gpu, size, again, busy)
    span = span_of(gpu, profile.op, rows, columns)
    work = work_of(profile, span)
    units = unit_times(gpu, work, rows * columns / base_elements(profile.op), busy)
    per_element = work.instructions / profile.elements
    path = path_time(gpu, profile, columns, span)
    launches = sum(kernel.launches for kernel in profile.one.machine)
    fixed = FIRST_LAUNCH + (launches - 1) * NEXT_LAUNCH
    fixed += (DRAM_LATENCY - machine_code.LATENCY["l2"]) / gpu.clock
    stream = max(memory, *units.values())
    alone = size / (gpu.efficiency * gpu.dram)
    start = FIRST_LAUNCH + DRAM_LATENCY / gpu.clock
    least, moving = start + alone, start + memory
    time = fixed + stream + path
    limits = {**units, "memory": memory, "latency": fixed + path}
    left = max(MOST_RATIO * moving - fixed, memory)
    return Prediction(
        gpu=gpu.name,
        op=profile.op,
        dtype=profile.dtype,
        rows=rows,
        columns=columns,
        bytes=round(size),
        launches=launches,
        instructions_per_element=round(per_element, 2),
        bound=max(limits, key=limits.__getitem__),
        path=round(1e6 * path, 2),
        time=round(1e6 * time, 2),
        least=round(1e6 * least, 2),
        flow=round((fixed + stream) / least, 3),
        moved=round((fixed + stream) / moving, 3),
        ratio=round(time / least, 3),
        ratio_strict=round(time / alone, 3),
        instructions_allowed=round(per_element * left / max(units.values()), 1),
        path_allowed=round(1e6 * max(MOST_RATIO * least - fixed - memory, 0.0), 2),
    )


def columns_of(op: str) -> tuple[int, ...]:
    """Those of an operator's table."""
    if op == "importance_weights":
        return (ROLLOUTS,)
    return DIMENSIONS if op in DIMENSIONAL else VOCABULARIES


def shapes_of(op: str, batches: Iterable[int], columns: Iterable[int]) -> list[tuple[int, int]]:
    """(rows, columns) of an operator."""
    each = rows_of(op) if op in DIMENSIONAL else 1
    return [(batch * each, n) for batch in batches for n in columns]


def predictions() -> list[Prediction]:
    """Every GPU, operator, dtype and shape."""
    profiles = emulate.recorded()[1]
    return [
        predict(gpu, p, rows, columns)
        for gpu in GPUS.values()
        for p in profiles
        for rows, columns in shapes_of(p.op, BATCHES, columns_of(p.op))
    ]


def looked_at(p: Prediction) -> list[tuple[int, int]]:
    """The shapes of an operator that the gate looks at, none on another GPU."""
    wanted = {*GATED_VOCABULARIES, *GATED_DIMENSIONS}
    columns = [n for n in columns_of(p.op) if n in wanted] or columns_of(p.op)
    return shapes_of(p.op, [GATED_BATCH], columns) if p.gpu == GPUS[GATED_GPU].name else []


def gated(found: Iterable[Prediction]) -> list[Prediction]:
    """The lines whose ``moved`` must be at most MOST_RATIO."""
    return [
        p for p in found if (p.op, p.dtype) not in NOT_GATED and (p.rows, p.columns) in looked_at(p)
    ]


def kept(found: Iterable[Prediction]) -> list[Prediction]:
    """The lines whose ratio must not become worse."""
    return [p for p in found if (p.rows, p.columns) in looked_at(p)[:1]]


def faults(found: Iterable[Prediction]) -> list[str]:
    """What the gate does not let pass, a line each."""
    found = list(found)
    slow = [
        f"{p.op} {p.dtype}, {p.columns} columns on {p.gpu}: {p.moved} times the time of the bytes "
        f"> {MOST_RATIO}; {p.instructions_allowed} instructions an element would do (now "
        f"{p.instructions_per_element})"
        for p in gated(found)
        if p.moved > MOST_RATIO
    ]
    worse = [
        f"{p.op} {p.dtype} on {p.gpu}: predicted {p.ratio} times the bytes' time > "
        f"{NO_WORSE.get((p.op, p.dtype), 0.0)}"
        for p in kept(found)
        if p.ratio > NO_WORSE.get((p.op, p.dtype), 0.0)
    ]
    return slow + worse


def bounds(found: Iterable[Prediction]) -> str:
    """NO_WORSE for these figures, as it stands in this file."""
    lines = [
        f'    ("{p.op}", "{p.dtype}"): {math.ceil(100 * SLACK * p.ratio) / 100},'
        for p in kept(found)
    ]
    return "\n".join(["NO_WORSE = {", *lines, "}"])


def document(found: Iterable[Prediction]) -> str:
    """What is written down: the model's constants and its figures, a line each."""
    head = {
        "status": "predicted, not measured",
        "sources": emulate.recorded()[0],
        "assumptions": {
            "first_launch_us": 1e6 * FIRST_LAUNCH,
            "next_launch_us": 1e6 * NEXT_LAUNCH,
            "issue_efficiency": ISSUE_EFFICIENCY,
            "l2_bytes_a_clock_and_sm": L2_BYTES,
            "dram_latency_cycles": DRAM_LATENCY,
            "latency_cycles": machine_code.LATENCY,
        },
        "gpus": [asdict(gpu) for gpu in GPUS.values()],
        "columns": [field.name for field in fields(Prediction)],
    }
    lines = ",\n  ".join(json.dumps(list(asdict(p).values())) for p in found)
    return json.dumps(head, indent=1)[:-2] + f',\n "predicted": [\n  {lines}\n ]\n}}\n'


def recorded() -> list[Prediction]:
    """The figures that are checked in."""
    return [Prediction(*line) for line in json.loads(RESULT.read_text())["predicted"]]


def stale() -> list[str]:
    """Are the checked-in figures what the model makes of the checked-in profiles?"""
    if RESULT.exists() and RESULT.read_text() == document(predictions()):
        return []
    return ["benchmarks/results/roofline.json is stale: run python -m benchmarks.roofline"]


def check() -> list[str]:
    """Why the checked-in figures do not stand; empty if they do."""
    return emulate.check() + faults(predictions()) + stale()


def show(found: Iterable[Prediction], gpu: Gpu) -> None:
    """The table of a GPU, as plain text."""
    print(f"{gpu.name}: times in us, predicted, not measured")
    print(
        f"{'operator':27}{'dtype':10}{'rows':>6}{'columns':>9}{'bytes':>11}  {'a row':15}"
        f"{'launches':>9}{'instr/el':>9}{'bound':>9}{'path':>7}{'time':>9}{'least':>9}{'flow':>7}"
        f"{'moved':>7}{'ratio':>7}{'strict':>8}"
    )
    for p in found:
        if p.gpu == gpu.name:
            print(
                f"{p.op:27}{p.dtype:10}{p.rows:>6}{p.columns:>9}{p.bytes:>11}"
                f"  {op_of(p.op).formula:15}{p.launches:>9}{p.instructions_per_element:>9.1f}"
                f"{p.bound:>9}{p.path:>7.2f}{p.time:>9.2f}{p.least:>9.2f}{p.flow:>7.2f}"
                f"{p.moved:>7.2f}{p.ratio:>7.2f}{p.ratio_strict:>8.2f}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in figures")
    parser.add_argument("--bounds", action="store_true", help="print NO_WORSE anew")
    parser.add_argument("--gpu", choices=GPUS, default=GATED_GPU, help="whose table to print")
    arguments = parser.parse_args()
    if arguments.bounds:
        print(bounds(predictions()))
        return 0
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

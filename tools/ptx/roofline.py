"""How long the CUDA kernels should take on GPUs that were not there to measure: *predicted* times.

    python -m tools.ptx.profiles --json FILE
    python -m tools.ptx.roofline FILE [--gpu A100]

FILE has instructions and paths (nvcc's machine code for sm_90, counted by machine_code.py; other
GPUs are taken to execute as many); bytes come from the formulas below, which are those at the head
of each .cu file. With B rows of V elements of s bytes, all times in seconds:

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
    ratio  = time / least
    flow   = (time - path) / least:  what bytes, instructions and launches alone make of it
    moved  = the same beside a kernel that also moves ``again``: flow, for operators of one pass

A path is what is left of a launch when the last bytes have arrived: its last block takes its
tile's maximum, exponentials and sum, counts itself in, and where it is the last of its row reads
the tiles' sums from L2, adds them up in float64 one after the other, chooses a tile, reads it
again, and draws. All of that is dependent steps of a few warps, listed with the cycles each waits
for in the profiles (``path``: L2, shuffles, barriers, float64, ...). It is exposed once a launch:
the other rows' paths are beside the stream of rows that come later, as are the other tiles of a
block that takes several one after another. Where tiles have a warp each, or blocks few warps
(A_WARP_EACH), it is the path of such a block.

That as many blocks are resident as it takes to keep memory or a unit busy is taken for granted:
kernel_table.py prints the occupancy. Nothing here was measured on a GPU; benchmarks/gpu_times.py
measures.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_times import BATCHES, DIMENSIONS, DRAFT, ROLLOUTS, SHARDS, STEPS, VOCABULARIES

from . import machine_code, profiles

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

SIZES = {"float32": 4, "bfloat16": 2}  # of an element, in bytes
BLOCKS_EACH = 3  # of a multiprocessor before blocks take several tiles (csrc/bind/cuda.cpp)


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
    "deferral_draw_kernel",
    "deferral_mask_kernel",
    "deferral_masses_kernel",
    "deferral_replace_kernel",
    "deferral_resolve_kernel",
    "sampling_draw_kernel",
    "verify_masses_kernel",
    "verify_statistics_kernel",
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

    ``bound`` names what takes longest: memory, issue, a unit, or latency (launches, paths).
    """

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
    return rows_of(op) * profiles.DIM if op in DIMENSIONAL else profiles.PROFILE_VOCAB


def span_of(gpu: Gpu, op: str, rows: int, columns: int) -> int:
    """Tiles that a block takes (span_of in csrc/cuda/launch.h), or what stands for them."""
    width = BLOCKS_EACH * gpu.sms
    tiles = -(-columns // profiles.TILE)
    if op == "prelogit_perturb":  # warps_of in csrc/cuda/prelogit.cu
        warps = 8
        while warps > 2 and rows * tiles * warps >= 16 * width:
            warps //= 2
        return 8 // warps
    if op == "normal":  # blocks of 64 threads with two Philox blocks each
        spare = -(-rows * columns // 512) // width
    else:
        spare = rows * op_of(op).positions * tiles // width
    return profiles.SPAN if spare >= profiles.SPAN else 2 if spare >= 2 else 1


@dataclass(frozen=True)
class Work:
    """Machine instructions, and turns of the units, of the call that was profiled."""

    instructions: float
    units: dict[str, float]


def machine_of(profile: profiles.Profile, span: int) -> list[profiles.Machine]:
    """The kernels as blocks with so many tiles have them."""
    most = profile.spanned if span == profiles.SPAN else None
    return (most or profile.one).machine


def work_of(profile: profiles.Profile, span: int) -> Work:
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


def paths_of(profile: profiles.Profile, span: int) -> list[profiles.Machine]:
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


def path_time(gpu: Gpu, profile: profiles.Profile, columns: int, span: int = 1) -> float:
    """Seconds of the paths of all launches, with so many tiles a block."""
    tiles = -(-columns // profiles.TILE)
    return (
        sum(
            kernel.launches
            * max(sum(kernel.path.values()) + (tiles - profiles.LONG) * kernel.path_per_tile, 0.0)
            for kernel in paths_of(profile, span)
        )
        / gpu.clock
    )


def memory_time(gpu: Gpu, size: float, again: float, busy: int) -> float:
    """Seconds to move ``size`` bytes, and ``again`` once more."""
    dram = gpu.efficiency * gpu.dram
    rest = again / (L2_BYTES * gpu.clock * busy if size <= gpu.l2 else dram)
    return size / min(dram, PORT_BYTES * gpu.clock * busy) + rest


def predict(gpu: Gpu, profile: profiles.Profile, rows: int, columns: int) -> Prediction:
    """The model at the head of this file."""
    op = op_of(profile.op)
    size = op.bytes(columns, SIZES[profile.dtype]) * rows
    again = op.again(columns, SIZES[profile.dtype]) * rows
    busy = min(gpu.sms, rows * op.models * -(-columns // profiles.TILE))
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
    return Prediction(
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


def predictions(gpu: Gpu, found: Iterable[profiles.Profile]) -> list[Prediction]:
    """Every operator, dtype and shape that benchmarks/gpu_times.py measures."""
    return [
        predict(gpu, p, rows, columns)
        for p in found
        for rows, columns in shapes_of(p.op, BATCHES, columns_of(p.op))
    ]


def show(found: Iterable[Prediction], gpu: Gpu) -> None:
    """The table of a GPU, as plain text."""
    print(f"{gpu.name}: times in us, predicted, not measured")
    print(
        f"{'operator':27}{'dtype':10}{'rows':>6}{'columns':>9}{'bytes':>11}  {'a row':15}"
        f"{'launches':>9}{'instr/el':>9}{'bound':>9}{'path':>7}{'time':>9}{'least':>9}{'flow':>7}"
        f"{'moved':>7}{'ratio':>7}"
    )
    for p in found:
        print(
            f"{p.op:27}{p.dtype:10}{p.rows:>6}{p.columns:>9}{p.bytes:>11}"
            f"  {op_of(p.op).formula:15}{p.launches:>9}{p.instructions_per_element:>9.1f}"
            f"{p.bound:>9}{p.path:>7.2f}{p.time:>9.2f}{p.least:>9.2f}{p.flow:>7.2f}"
            f"{p.moved:>7.2f}{p.ratio:>7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("profiles", type=Path, help="what profiles.py --json wrote")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="whose table to print")
    arguments = parser.parse_args()
    gpu = GPUS[arguments.gpu]
    show(predictions(gpu, profiles.read(arguments.profiles)), gpu)


if __name__ == "__main__":
    main()

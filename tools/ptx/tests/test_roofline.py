"""tools/ptx/roofline.py: the model, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_times
from tools.ptx import profiles, roofline

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def machine_of(instructions: int, wait: int) -> profiles.Machine:
    """About what a draw over 128256 logits takes."""
    shares = {"fp32": 0.59, "imad": 0.01, "alu": 0.26, "fp64": 0.001, "xu": 0.0005, "lsu": 0.1,
              "uniform": 0.02, "control": 0.02}  # fmt: skip
    units = {unit: round(share * instructions) for unit, share in shares.items()}
    path = {"issue": 1916, "l2": wait, "shuffle": 436, "fp64": 267}
    return profiles.Machine("sampling_draw_kernel", 1, instructions, units, path, 8.8)


def profile_of(op: str, dtype: str) -> profiles.Profile:
    elements = profiles.elements_of(op)
    one, spanned = (
        profiles.Figures(1.0, 0, 30.0, each, [machine_of(round(each * elements), wait)])
        for each, wait in ((24.0, 1943), (22.0, 2870))
    )
    return profiles.Profile(op, dtype, 1, elements, [], one, spanned)


@pytest.mark.parametrize("gpu", roofline.GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", roofline.SIZES)
def test_the_model_by_hand(gpu: roofline.Gpu, dtype: str) -> None:
    """One pass over 64 rows of 128256 logits, one launch."""
    p = profile_of("categorical_sample", dtype)
    got = roofline.predict(gpu, p, 64, 128256)
    size = 64 * 128256 * roofline.SIZES[dtype]
    memory = size / (gpu.efficiency * gpu.dram)
    assert p.spanned
    # Tiles of 16-bit elements have a warp each; those of float32 follow one another.
    (kernel,) = (p.one if dtype == "float32" else p.spanned).machine
    # 64 rows of 32 tiles: four and more for each of 3 * 170 blocks.
    span = 4
    assert roofline.span_of(gpu, p.op, 64, 128256) == span
    work = roofline.work_of(p, span)
    turns = {**work.units, "fp32": work.units["fp32"] + work.units["imad"]}
    cycles = [64 * work.instructions / 128] + [
        64 * turns[unit] / gpu.lanes[unit] for unit in gpu.lanes
    ]
    compute = max(cycles) / (0.8 * gpu.clock * gpu.sms)
    # 32 tiles: as many as the path was looked at with.
    path = sum(kernel.path.values()) / gpu.clock
    launch = 2.0e-6
    to_dram, to_l2 = 656 / gpu.clock, 336 / gpu.clock
    assert got.bytes == size
    assert got.launches == 1
    assert got.path == pytest.approx(1e6 * path, abs=0.01)
    least = launch + to_dram + memory
    time = launch + to_dram - to_l2 + max(memory, compute) + path
    assert got.least == pytest.approx(1e6 * least, abs=0.01)
    assert got.time == pytest.approx(1e6 * time, abs=0.01)
    assert got.flow == pytest.approx((time - path) / least, abs=0.001)
    assert got.ratio == pytest.approx(time / least, abs=0.001)


def test_the_kernels_that_the_model_names_exist() -> None:
    """The profiles have the names of the sources."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert [name for name in roofline.A_WARP_EACH if f" {name}(" not in sources] == []


def test_float64_and_integers_have_their_own_lanes() -> None:
    p = profile_of("categorical_sample", "float32")
    work = roofline.work_of(p, 1)
    base = roofline.unit_times(roofline.GPUS["H100"], work, 1.0, 132)
    for unit in ("fp64", "alu", "imad", "lsu"):
        more = replace(work, units={**work.units, unit: 2 * work.units[unit]})
        times = roofline.unit_times(roofline.GPUS["H100"], more, 1.0, 132)
        changed = {name for name in times if times[name] != base[name]}
        # Multiplications of integers are done by lanes of the floating-point unit.
        assert changed == ({"imad", "fp32"} if unit == "imad" else {unit})
        assert times[unit] == pytest.approx(2 * base[unit])


def test_few_rows_cannot_use_the_whole_gpu() -> None:
    """A row of one tile is the work of one SM, whatever the GPU."""
    p = profile_of("categorical_sample", "float32")
    one = roofline.predict(roofline.GPUS["H100"], p, 1, 4096)
    many = roofline.predict(roofline.GPUS["H100"], p, 132, 4096)
    assert one.time == pytest.approx(many.time, rel=0.05)


def test_many_rows_have_several_tiles_a_block() -> None:
    """As many as csrc/cuda/launch.h says, and work in proportion to the blocks that are left."""
    gpu = roofline.GPUS["H100"]
    spans = [roofline.span_of(gpu, "prelogit_perturb", rows, 4096) for rows in (1, 792, 1584)]
    assert spans == [1, 2, 4]
    assert [roofline.span_of(gpu, "normal", rows, 512) for rows in (791, 792, 1584)] == [1, 2, 4]
    assert [roofline.span_of(gpu, "categorical_sample", rows, 4096) for rows in (
        1, 2 * 396 - 1, 2 * 396, 4 * 396 - 1, 4 * 396, 1 << 20
    )] == [1, 1, 2, 2, 4, 4]  # fmt: skip
    assert roofline.span_of(gpu, "deferral_verify", 160, 4096) == 2  # five positions each
    header = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    assert f"constexpr int kMostSpan = {profiles.SPAN};" in header
    assert "return spare >= kMostSpan ? kMostSpan : spare >= 2 ? 2 : 1;" in header
    binding = (ROOT / "csrc" / "bind" / "cuda.cpp").read_text()
    assert f"return {roofline.BLOCKS_EACH} * static_cast<int64_t>(processors);" in binding
    p = profile_of("categorical_sample", "float32")
    one, two, four = (roofline.work_of(p, span).instructions for span in (1, 2, 4))
    assert (one, two, four) == (24 * 128256, 24 * 128256, 22 * 128256)
    only = replace(p, spanned=None)
    assert roofline.work_of(only, 4) == roofline.work_of(only, 1)


def test_longer_rows_have_longer_paths() -> None:
    p = profile_of("categorical_sample", "float32")
    gpu = roofline.GPUS["H100"]
    (kernel,) = p.one.machine
    p = replace(p, one=replace(p.one, machine=[replace(kernel, path_per_tile=5.0)]))
    short, long = (roofline.path_time(gpu, p, 4096 * tiles) for tiles in (16, 64))
    assert long - short == pytest.approx(48 * 5.0 / gpu.clock)


def test_what_is_measured_is_predicted() -> None:
    """Every call and shape of benchmarks/gpu_times.py, and no other."""
    shapes = ((8,), (130,), (12,))
    called = {(case.op, case.dtype) for case in gpu_times.calls(*shapes, "cpu")}
    assert called == set(profiles.cases())
    found = roofline.predictions(roofline.GPUS["H100"], [profile_of(*case) for case in called])
    assert {(p.op, p.dtype) for p in found} == called
    assert all(p.time >= p.least > 0.0 for p in found if p.op in roofline.LOGITS)

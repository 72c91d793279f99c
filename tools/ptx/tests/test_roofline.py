"""The figures of the CUDA kernels that need no GPU: the emulator's profile, the roofline model."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import emulate, gpu_times, roofline

ROOT = Path(__file__).resolve().parent.parent

# The emulator's format: a request of a whole warp, one word for a warp, a bank conflict.
SAMPLE = """\
_ZN3tta4cuda44_GLOBAL__N__1_11_sampling_cu_draw11draw_kernelINS1_11CategoricalEEEvT_: 1000 instr
global PTX line 7 (source tile.cuh:57): req 4 lanes/req 32.0 bytes 2048 sectors 64 (ideal 64)  ld.global.nc.v4.f32 {%f1}
global PTX line 8 (source row.cuh:7): req 4 lanes/req 32.0 bytes 1024 sectors 4 (ideal 4)  ld.global.u64 %rd1, [%rd2]
shared PTX line 9 (source tile.cuh:8): req 1 lanes/req 32.0 bytes 128 wavefronts 32 (ideal 1)  ld.shared.f32 %f1, [%r1]
kernels_test: ok (0 failed checks)
"""  # noqa: E501


@pytest.fixture(scope="module")
def profiles() -> list[emulate.Profile]:
    return emulate.recorded()[1]


def profile_of(profiles: list[emulate.Profile], op: str, dtype: str) -> emulate.Profile:
    return next(p for p in profiles if (p.op, p.dtype) == (op, dtype))


def test_the_figures_are_of_these_sources_and_within_their_bounds() -> None:
    assert emulate.check() == []
    assert roofline.stale() == []


def test_the_predictions_pass_the_gate() -> None:
    assert roofline.faults(roofline.predictions()) == []


def test_every_operator_was_checked_in_every_order() -> None:
    record = json.loads(emulate.RESULT.read_text())
    ran = {
        (c["family"], c["order"], c["switches"], c["width"])
        for c in record["checks"]
        if c["passed"]
    }
    assert ran == {(f, *order) for f in emulate.FAMILIES for order in emulate.ORDERS}
    # Every kernel that the sources define, launched.
    assert all(record["launches"].values())
    defined = {
        name
        for path in (ROOT / "csrc" / "cuda").iterdir()
        for name in re.findall(r"\b([a-z_]+_kernel)\(", path.read_text())
    }
    assert {
        re.sub(r"(?:.*: )?(\w+_kernel).*", r"\1", name) for name in record["launches"]
    } == defined


def test_a_kernel_that_never_ran_is_a_fault(tmp_path: Path) -> None:
    """As is a family that differs from the CPU."""
    prefix = "_ZN3tta4cuda44_GLOBAL__N__d58ce67e_11_knapsack_cu_02e8286e"
    ptx = tmp_path / "knapsack.ptx"
    ptx.write_text(
        f".visible .entry {prefix}12tally_kernelENS1_4SackE(\n"
        f".visible .entry {prefix}12merge_kernelI6float4EEvPKT_(\n"
    )

    class Fake:
        ptx: ClassVar[list[Path]] = [tmp_path / "knapsack.ptx"]
        kernels = ("12tally_kernelENS1_4SackE", "12merge_kernelI6float4EEvPKT_")
        code = 0

        def __call__(self, *_: object, **__: object) -> subprocess.CompletedProcess[str]:
            text = "".join(f"{prefix}{name}: 10 instr\n" for name in self.kernels)
            return subprocess.CompletedProcess([], self.code, "", text)

    fake = Fake()
    orders = [(0, 0.0, 512), (1, 0.0, 1)]
    ran, launches = emulate.check_families(fake, orders)  # type: ignore[arg-type]
    assert len(ran) == 2 * len(emulate.FAMILIES)
    assert launches == {
        "knapsack: merge_kernelI6float4EEv": 2 * len(emulate.FAMILIES),
        "knapsack: tally_kernel": 2 * len(emulate.FAMILIES),
    }
    fake.kernels = fake.kernels[:1]
    with pytest.raises(
        emulate.Failed, match="no family launched knapsack: merge_kernelI6float4EEv"
    ):
        emulate.check_families(fake, orders)  # type: ignore[arg-type]
    fake.code = 1
    with pytest.raises(emulate.Failed, match="deferral, order 0"):
        emulate.check_families(fake, orders)  # type: ignore[arg-type]


def test_the_profile_is_read_as_the_emulator_prints_it() -> None:
    name = SAMPLE.partition(":")[0]
    (launch,) = emulate.read_profile(SAMPLE)
    assert launch.kernel == name
    assert emulate.plain(name) == "draw_kernel"
    assert launch.ptx == 1000
    assert launch.sectors == 64 + 1  # what every warp reads counts once
    assert launch.wavefronts - launch.ideal_wavefronts == 31


def test_a_second_pass_or_more_instructions_do_not_pass(profiles: list[emulate.Profile]) -> None:
    good = profile_of(profiles, "categorical_sample", "float32")
    one, more = emulate.MOST_INSTRUCTIONS[good.op]
    assert not emulate.faults([good])
    assert good.spanned
    for change in ({"dram_ratio": 2.0}, {"bank_conflicts": 1}):
        assert emulate.faults([replace(good, one=replace(good.one, **change))])
        assert emulate.faults([replace(good, spanned=replace(good.spanned, **change))])
    slower = replace(good.one, instructions_per_element=1.01 * one)
    assert emulate.faults([replace(good, one=slower)])
    slower = replace(good.spanned, instructions_per_element=1.01 * more)
    assert emulate.faults([replace(good, spanned=slower)])


def test_conflicts_of_histograms_have_a_bound(profiles: list[emulate.Profile]) -> None:
    for op, most in emulate.MOST_CONFLICTS.items():
        p = profile_of(profiles, op, "float32")
        assert not emulate.faults([replace(p, one=replace(p.one, bank_conflicts=most))])
        assert emulate.faults([replace(p, one=replace(p.one, bank_conflicts=most + 1))])


def test_what_has_a_ratio(profiles: list[emulate.Profile]) -> None:
    for p in profiles:
        assert (p.one.dram_ratio is None) == (p.op in emulate.ARITHMETIC)
        assert (p.spanned is None) == (p.op not in emulate.SPANNED)
        # Never less than the bytes: that would be a wrong formula.
        assert p.one.dram_ratio is None or p.one.dram_ratio >= 1.0
        assert p.spanned is None or (p.spanned.dram_ratio or 0.0) >= 1.0


def test_the_bounds_are_those_of_the_figures(profiles: list[emulate.Profile]) -> None:
    """Printed anew, no table would be wider."""
    table: dict[str, Any] = {}
    exec(emulate.bounds(profiles), {}, table)
    assert table["MOST_INSTRUCTIONS"].keys() == emulate.MOST_INSTRUCTIONS.keys()
    for op, most in emulate.MOST_INSTRUCTIONS.items():
        now = table["MOST_INSTRUCTIONS"][op]
        assert now[0] <= most[0]
        assert now[1] <= most[1]
    assert table["MOST_CONFLICTS"].keys() == emulate.MOST_CONFLICTS.keys()
    for op, lost in emulate.MOST_CONFLICTS.items():
        assert table["MOST_CONFLICTS"][op] <= lost
    ratios: dict[str, dict[tuple[str, str], float]] = {}
    exec(roofline.bounds(roofline.predictions()), {}, ratios)
    assert ratios["NO_WORSE"].keys() == roofline.NO_WORSE.keys()


@pytest.mark.parametrize("gpu", roofline.GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", roofline.SIZES)
def test_the_model_by_hand(profiles: list[emulate.Profile], gpu: roofline.Gpu, dtype: str) -> None:
    """One pass over 64 rows of 128256 logits, one launch."""
    p = profile_of(profiles, "categorical_sample", dtype)
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
    assert got.ratio_strict == pytest.approx(time / memory, abs=0.001)


def test_float64_and_integers_have_their_own_lanes(profiles: list[emulate.Profile]) -> None:
    p = profile_of(profiles, "categorical_sample", "float32")
    work = roofline.work_of(p, 1)
    base = roofline.unit_times(roofline.GPUS["H100"], work, 1.0, 132)
    for unit in ("fp64", "alu", "imad", "lsu"):
        more = replace(work, units={**work.units, unit: 2 * work.units[unit]})
        times = roofline.unit_times(roofline.GPUS["H100"], more, 1.0, 132)
        changed = {name for name in times if times[name] != base[name]}
        # Multiplications of integers are done by lanes of the floating-point unit.
        assert changed == ({"imad", "fp32"} if unit == "imad" else {unit})
        assert times[unit] == pytest.approx(2 * base[unit])


def test_few_rows_cannot_use_the_whole_gpu(profiles: list[emulate.Profile]) -> None:
    """A row of one tile is the work of one SM, whatever the GPU."""
    p = profile_of(profiles, "categorical_sample", "float32")
    one = roofline.predict(roofline.GPUS["H100"], p, 1, 4096)
    many = roofline.predict(roofline.GPUS["H100"], p, 132, 4096)
    assert one.time == pytest.approx(many.time, rel=0.05)


def test_many_rows_have_several_tiles_a_block(profiles: list[emulate.Profile]) -> None:
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
    assert f"constexpr int kMostSpan = {emulate.SPAN};" in header
    assert "return spare >= kMostSpan ? kMostSpan : spare >= 2 ? 2 : 1;" in header
    binding = (ROOT / "csrc" / "bind" / "cuda.cpp").read_text()
    assert f"return {roofline.BLOCKS_EACH} * static_cast<int64_t>(processors);" in binding
    for p in profiles:
        one, two, four = (roofline.work_of(p, span) for span in (1, 2, 4))
        assert one.instructions == sum(kernel.instructions for kernel in p.one.machine)
        assert two == one
        most = (p.spanned or p.one).machine
        assert four.instructions == sum(kernel.instructions for kernel in most)
        assert four.instructions <= 1.001 * one.instructions


def test_longer_rows_have_longer_paths(profiles: list[emulate.Profile]) -> None:
    p = profile_of(profiles, "categorical_sample", "float32")
    gpu = roofline.GPUS["H100"]
    (kernel,) = p.one.machine
    p = replace(p, one=replace(p.one, machine=[replace(kernel, path_per_tile=5.0)]))
    short, long = (roofline.path_time(gpu, p, 4096 * tiles) for tiles in (16, 64))
    assert long - short == pytest.approx(48 * 5.0 / gpu.clock)


def test_what_the_gate_looks_at(profiles: list[emulate.Profile]) -> None:
    found = roofline.predictions()
    gate = roofline.gated(found)
    kept = {(p.op, p.dtype) for p in roofline.kept(found)}
    assert kept > set(roofline.NOT_GATED)
    assert {(p.op, p.dtype) for p in gate} == kept - set(roofline.NOT_GATED)
    assert {p.columns for p in gate if p.op in roofline.LOGITS} == {128256, 256000}
    assert kept == roofline.NO_WORSE.keys()
    assert {op for op, _ in roofline.NO_WORSE} == {p.op for p in profiles}


def lighter(profile: emulate.Profile, work: float, path: float) -> emulate.Profile:
    """A profile with so much of the instructions, and of the paths."""

    def figures(of: emulate.Figures) -> emulate.Figures:
        kernels = [
            replace(
                kernel,
                instructions=round(work * kernel.instructions),
                units={unit: round(work * n) for unit, n in kernel.units.items()},
                path={why: round(path * n) for why, n in kernel.path.items()},
                path_per_tile=path * kernel.path_per_tile,
            )
            for kernel in of.machine
        ]
        return replace(of, machine=kernels)

    more = profile.spanned
    return replace(profile, one=figures(profile.one), spanned=more and figures(more))


def test_the_gate_rejects_what_is_too_slow(profiles: list[emulate.Profile]) -> None:
    """As much as the gate leaves room for passes, and hardly more."""
    gpu = roofline.GPUS["H100"]
    p = lighter(profile_of(profiles, "deferral_sample", "float32"), 0.1, 0.1)
    line = roofline.predict(gpu, p, 64, 128256)
    assert line.bound == "memory"
    assert not roofline.faults([line])
    for change, passes in ((0.98, True), (1.02, False)):
        work = line.instructions_allowed / line.instructions_per_element
        tried = roofline.predict(gpu, lighter(p, change * work, 1.0), 64, 128256)
        assert (tried.moved <= roofline.MOST_RATIO) == passes
        assert (not roofline.faults([tried])) == passes
        # The path has a bound of its own.
        path = line.path_allowed / line.path
        tried = roofline.predict(gpu, lighter(p, 1.0, change * path), 64, 128256)
        assert (tried.ratio <= roofline.MOST_RATIO) == passes
        assert tried.moved == line.moved
    most = roofline.NO_WORSE["deferral_sample", "float32"]
    slow = roofline.predict(gpu, lighter(p, 1.0, 2 * most * line.least / line.path), 64, 128256)
    assert slow.ratio > most
    assert roofline.faults([slow])


def test_other_operators_must_not_become_worse(profiles: list[emulate.Profile]) -> None:
    p = profile_of(profiles, "deferral_mask", "float32")
    gpu = roofline.GPUS["H100"]
    assert not roofline.faults([roofline.predict(gpu, p, 64, 128256)])
    assert roofline.faults([roofline.predict(gpu, lighter(p, 1.5, 1.5), 64, 128256)])


def test_every_measured_call_runs_and_is_predicted() -> None:
    """On the CPU, small: what gpu_times will call on a GPU."""
    known = {p.op for p in roofline.recorded()}
    seen = set()
    for case in gpu_times.calls((2,), (130,), (12,), "cpu"):
        result = case.call()
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        assert all(t.numel() for t in tensors)
        seen.add(case.op)
    assert seen == known


def test_predictions_are_for_the_part_they_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
        "NVIDIA H200": "H200 SXM",
        "NVIDIA B200": "B200",
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA A100-PCIE-40GB": None,
        "NVIDIA A100-SXM4-40GB": None,
        "NVIDIA GH200 480GB": None,
        "NVIDIA GeForce RTX 5090": None,
    }
    found = {name: gpu_times.known(name) for name in names}
    assert {name: gpu and gpu.name for name, gpu in found.items()} == names


def test_gpu_check_degrades_without_a_gpu(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    dry = subprocess.run(
        ["bash", str(script), "--dry-run", str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": os.environ.get("PYTHON", "python3")},
    )
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert not (tmp_path / "logs").exists()
    for expected in ("environment", "tests", "times", "nothing failed (dry run)"):
        assert expected in dry.stdout

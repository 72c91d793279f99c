"""The figures of the CUDA kernels that need no GPU: the emulator's profile, the roofline model."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

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
    assert roofline.check() == []


def test_every_operator_was_checked_in_every_order() -> None:
    checks = json.loads(emulate.RESULT.read_text())["checks"]
    ran = {(c["family"], c["order"], c["switches"]) for c in checks if c["passed"]}
    assert ran == {(f, *order) for f in emulate.FAMILIES for order in emulate.ORDERS}


def test_the_profile_is_read_as_the_emulator_prints_it() -> None:
    name = SAMPLE.partition(":")[0]
    (launch,) = emulate.read_profile(SAMPLE, {name: {"float": 1.0}})
    assert launch.kernel == "draw_kernel"
    assert launch.instructions == 1000
    assert launch.sectors == 64 + 1  # what every warp reads counts once
    assert launch.wavefronts - launch.ideal_wavefronts == 31


def test_units_of_ptx() -> None:
    text = """.entry one(.param .u64 a)
{
\tld.global.f32 %f1, [%rd1];
\t@%p1 fma.rn.f32 %f2, %f1, %f1, %f1;
\tadd.f64 %fd1, %fd2, %fd3;
\tmul.hi.u32 %r1, %r2, %r3;
\tmov.u32 %r4, %r5;
}"""
    assert emulate.mixes(text) == {
        "one": {"memory": 0.2, "float": 0.2, "double": 0.2, "integer": 0.2, "other": 0.2}
    }


def test_a_second_pass_or_more_instructions_do_not_pass(profiles: list[emulate.Profile]) -> None:
    good = profile_of(profiles, "categorical_sample", "float32")
    assert not emulate.faults([good])
    assert emulate.faults([replace(good, dram_ratio=2.0)])
    assert emulate.faults([replace(good, bank_conflicts=1)])
    assert emulate.faults([replace(good, instructions_per_element=40.0)])


@pytest.mark.parametrize("gpu", roofline.GPUS.values(), ids=lambda gpu: gpu.name)
def test_the_model_by_hand(profiles: list[emulate.Profile], gpu: roofline.Gpu) -> None:
    """One pass over 64 rows of 128256 float32 logits, one launch, one stage."""
    p = profile_of(profiles, "categorical_sample", "float32")
    got = roofline.predict(gpu, p, 64, 128256)
    size = 64 * 128256 * 4
    memory = size / (0.9 * gpu.dram)
    instructions = p.launches[0].instructions * 64
    cycles = [instructions / 128] + [
        instructions * p.launches[0].mix[unit] / gpu.lanes[unit]
        for unit in ("float", "integer", "double")
    ]
    compute = max(cycles) / (0.8 * gpu.clock * gpu.sms)
    assert got.bytes == size
    assert got.launches == 1
    assert got.least == pytest.approx(1e6 * (2.0e-6 + memory), abs=0.01)
    assert got.time == pytest.approx(1e6 * (4.0e-6 + max(memory, compute)), abs=0.01)
    assert got.bound == ("memory" if memory > compute else got.bound)


def test_few_rows_cannot_use_the_whole_gpu(profiles: list[emulate.Profile]) -> None:
    """A row of one tile is the work of one SM, whatever the GPU."""
    p = profile_of(profiles, "categorical_sample", "float32")
    one = roofline.predict(roofline.GPUS["H100"], p, 1, 4096)
    many = roofline.predict(roofline.GPUS["H100"], p, 132, 4096)
    assert one.time == pytest.approx(many.time, rel=0.05)


def test_the_gate_rejects_what_is_too_slow(profiles: list[emulate.Profile]) -> None:
    found = roofline.predictions()
    assert len(roofline.gated(found)) == len(roofline.GATED_OPS)
    assert not roofline.faults(found)
    p = profile_of(profiles, "deferral_sample", "float32")
    slow = replace(p, launches=[replace(x, instructions=2 * x.instructions) for x in p.launches])
    assert roofline.faults([roofline.predict(roofline.GPUS["H100"], slow, 64, 128256)])
    # As many as the gate leaves room for pass, and hardly more.
    room = roofline.predict(roofline.GPUS["H100"], p, 64, 128256).instructions_allowed
    factor = room / p.instructions_per_element
    for change, passes in ((0.98, True), (1.02, False)):
        tried = replace(
            p,
            launches=[
                replace(x, instructions=int(change * factor * x.instructions)) for x in p.launches
            ],
        )
        line = roofline.predict(roofline.GPUS["H100"], tried, 64, 128256)
        assert (not roofline.faults([line])) == passes


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

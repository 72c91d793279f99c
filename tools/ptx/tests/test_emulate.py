"""tools/ptx/emulate.py and profiles.py: what they make of the emulator's output."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import pytest

from tools.ptx import emulate, profiles
from tools.ptx.emulator import Failed

# The emulator's format: a request of a whole warp, one word for a warp, a bank conflict.
SAMPLE = """\
_ZN3tta4cuda44_GLOBAL__N__1_11_sampling_cu_draw11draw_kernelINS1_11CategoricalEEEvT_: 1000 instr
global PTX line 7 (source tile.cuh:57): req 4 lanes/req 32.0 bytes 2048 sectors 64 (ideal 64)  ld.global.nc.v4.f32 {%f1}
global PTX line 8 (source row.cuh:7): req 4 lanes/req 32.0 bytes 1024 sectors 4 (ideal 4)  ld.global.u64 %rd1, [%rd2]
shared PTX line 9 (source tile.cuh:8): req 1 lanes/req 32.0 bytes 128 wavefronts 32 (ideal 1)  ld.shared.f32 %f1, [%r1]
kernels_test: ok (0 failed checks)
"""  # noqa: E501


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
        kernels: tuple[str, ...] = ("12tally_kernelENS1_4SackE", "12merge_kernelI6float4EEvPKT_")
        code = 0

        def __call__(self, *_: object, **__: object) -> subprocess.CompletedProcess[str]:
            text = "".join(f"{prefix}{name}: 10 instr\n" for name in self.kernels)
            return subprocess.CompletedProcess([], self.code, "", text)

    fake = Fake()
    orders = [(0, 0.0, 512), (1, 0.0, 1)]
    emulate.check_families(fake, orders)  # type: ignore[arg-type]
    tally, merge = fake.kernels
    for ran, missing in ((tally, "merge_kernelI6float4EEv"), (merge, "tally_kernel")):
        fake.kernels = (ran,)
        with pytest.raises(Failed, match=f"no family launched knapsack: {missing}$"):
            emulate.check_families(fake, orders)  # type: ignore[arg-type]
    fake.code = 1
    with pytest.raises(Failed, match="deferral: order 0"):
        emulate.check_families(fake, orders)  # type: ignore[arg-type]


def test_the_profile_is_read_as_the_emulator_prints_it() -> None:
    name = SAMPLE.partition(":")[0]
    (launch,) = profiles.read_profile(SAMPLE)
    assert launch.kernel == name
    assert profiles.plain(name) == "draw_kernel"
    assert launch.ptx == 1000
    assert launch.sectors == 64 + 1  # what every warp reads counts once
    assert launch.wavefronts - launch.ideal_wavefronts == 31
    # 2080 bytes of the 16 KiB tile that an operator of one pass has to read.
    ratio = profiles.dram_ratio("categorical_sample", "float32", [launch], 1)
    assert ratio == pytest.approx(32 * 65 / 16384, abs=1e-4)
    assert profiles.conflicts([launch]) == 31


def test_profiles_are_read_as_they_are_written(tmp_path: Path) -> None:
    machine = profiles.Machine("draw_kernel", 1, 1000, {"fp32": 5}, {"l2": 336}, 8.5)
    one = profiles.Figures(1.01, 0, 30.0, 25.0, [machine])
    launch = profiles.Launch("draw_kernel", 1000, 65, 32, 32)
    found = [
        profiles.Profile("categorical_sample", "float32", 1, 128256, [launch], one, spanned)
        for spanned in (one, None)
    ]
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps([asdict(p) for p in found]))
    assert profiles.read(path) == found

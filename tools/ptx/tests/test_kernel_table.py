"""tools/ptx/kernel_table.py: what it makes of a compiled kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.ptx import kernel_table
from tta_ext.build import BuildError, cuda


def test_occupancy() -> None:
    """By hand: 64 registers of 256 threads are a quarter of an SM's; 100 KiB of shared memory fill
    one of sm_120 and two of sm_90.
    """
    assert kernel_table.occupancy("90", 256, 64, 0) == (4, 0.5, "registers")
    assert kernel_table.occupancy("90", 256, 32, 0) == (8, 1.0, "warps")
    assert kernel_table.occupancy("120", 128, 16, 0) == (12, 1.0, "warps")
    assert kernel_table.occupancy("120", 128, 16, 99 * 1024) == (1, 4 / 48, "shared")
    assert kernel_table.occupancy("90", 128, 16, 100 * 1024) == (2, 8 / 64, "shared")
    assert kernel_table.occupancy("80", 32, 16, 0) == (32, 0.5, "blocks")
    assert kernel_table.occupancy("80", 256, 96, 0)[0] == 2


def test_what_is_seen_of_a_kernel(tmp_path: Path) -> None:
    """One with an array that no register can hold, and a clean one beside it."""
    try:
        toolkit = cuda.find_toolkit()
        kernel_table.tool("cuobjdump")
    except BuildError as error:
        pytest.skip(str(error))
    source = tmp_path / "planted.cu"
    source.write_text(
        "namespace tta { namespace {\n"
        "template <int N>\n"
        "__global__ void __launch_bounds__(128) planted(const int* i, float* x) {\n"
        "  float a[N];\n"
        "  for (int k = 0; k < N; ++k) a[k] = x[k];\n"
        "  if (N > 1) a[i[threadIdx.x]] = 1.0f;\n"
        "  for (int k = 0; k < N; ++k) x[k * 128 + threadIdx.x] = a[(k + i[0]) % N];\n"
        "}\n"
        "__global__ void wide(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }\n"
        "} }\n"
        "void launch(const int* i, float* x, float4* y) {\n"
        "  tta::planted<64><<<1, 128>>>(i, x); tta::wide<<<1, 128>>>(y, y);\n"
        "}\n"
    )
    kernels = kernel_table.measure(toolkit, [source])
    assert [(k.kernel, k.arch) for k in kernels] == [
        (name, f"sm_{arch}") for name in ("planted<64>", "wide") for arch in cuda.ARCHITECTURES
    ]
    planted, wide = kernels[0], kernels[-1]
    assert planted.threads == 128
    assert planted.stack >= 256
    assert planted.local_accesses
    assert (wide.stack, wide.spills, wide.local_accesses) == (0, 0, 0)
    assert (wide.loads_128, wide.stores_128, wide.loads_64) == (1, 1, 0)
    assert f"| planted.cu | wide | {wide.arch} | " in kernel_table.render(kernels, "nvcc")
    line = f"| `wide` | {' | '.join(f'{k.registers} / 0' for k in kernels[len(kernels) // 2 :])} |"
    assert kernel_table.summary(kernels, "nvcc").endswith(line)

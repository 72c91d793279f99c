"""tools/ptx/machine_code.py: how often machine instructions run, and how long they take alone."""

from __future__ import annotations

import pytest

from tools.ptx import counters, machine_code
from tools.ptx.emulator import Emulator
from tools.ptx.kernel_table import tool
from tta_ext.build import BuildError

BLOCKS, THREADS, LOOPS, EXTRA = 3, 128, 40, 48
WARPS = BLOCKS * THREADS // 32

# Every multiplication depends on the one before, so that none can be left out.
PROGRAM = f"""
#include <cstdio>
__global__ void straight(float* x) {{
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 100; ++i) v = __fmaf_rn(v, v, 1.0f);
  x[blockIdx.x * blockDim.x + threadIdx.x] = v;
}}
__global__ void tall(float* x) {{
  float v = x[blockIdx.y * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 100; ++i) v = __fmaf_rn(v, v, 1.0f);
  x[blockIdx.y * blockDim.x + threadIdx.x] = v;
}}
__global__ void looped(float* x, int n) {{
  float v = x[threadIdx.x];
  for (int i = 0; i < n; ++i) {{
#pragma unroll
    for (int k = 0; k < 8; ++k) v = __fmaf_rn(v, v, 1.0f);
  }}
  x[threadIdx.x] = v;
}}
__global__ void diverging(float* x, int n) {{
  __shared__ float part[32];
  float v = x[threadIdx.x];
  if (threadIdx.x < 5) {{  // five lanes of one warp of a block
#pragma unroll 1
    for (int i = 0; i < n; ++i) v = __fmul_rn(v, v);
    part[threadIdx.x] = v;
  }}
  __syncthreads();
  x[threadIdx.x] = __fadd_rn(v, part[0]);
}}
int main() {{
  float* x = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&x), {BLOCKS * THREADS} * sizeof(float))) return 1;
  cudaMemset(x, 0, {BLOCKS * THREADS} * sizeof(float));
  straight<<<{BLOCKS}, {THREADS}>>>(x);
  tall<<<dim3(1, {BLOCKS}), {THREADS}>>>(x);
  looped<<<{BLOCKS}, {THREADS}>>>(x, {LOOPS});
  diverging<<<{BLOCKS}, {THREADS}>>>(x, {EXTRA});
  return cudaGetLastError() ? 1 : 0;
}}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    folder = tmp_path_factory.mktemp("machine_code")
    source = folder / "tiny.cu"
    source.write_text(PROGRAM)
    try:
        return Emulator(folder, [source])
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def counted(emulator: Emulator) -> dict[str, machine_code.Executed]:
    return emulator.count()


def of(counted: dict[str, machine_code.Executed], name: str) -> machine_code.Executed:
    return next(executed for kernel, executed in counted.items() if name in kernel)


def test_a_straight_kernel_is_its_listing_once_a_warp(
    emulator: Emulator, counted: dict[str, machine_code.Executed]
) -> None:
    listing = machine_code.disassemble(
        tool("nvdisasm"), emulator.folder / "tiny" / "tiny.sm_90.cubin"
    )
    body = listing.split(".text._Z8straightPf:")[1].split("EXIT")[0]
    by_hand = sum("/*0" in line for line in body.splitlines()) + 1
    straight = of(counted, "straight")
    assert straight.instructions == pytest.approx(32 * WARPS * by_hand, rel=0.03)
    assert straight.units["fp32"] == 32 * WARPS * 100


def test_a_loop_counts_as_often_as_it_ran(counted: dict[str, machine_code.Executed]) -> None:
    looped = of(counted, "looped")
    assert looped.units["fp32"] == pytest.approx(32 * WARPS * 8 * LOOPS, rel=0.03)
    # Beside them a counter, a comparison and a branch for some of them, and twenty at the ends.
    assert 32 * WARPS * 8 * LOOPS < looped.instructions < 32 * WARPS * (12 * LOOPS + 20)


def test_a_warp_counts_whole_for_five_of_its_lanes(
    counted: dict[str, machine_code.Executed],
) -> None:
    diverging = of(counted, "diverging")
    assert diverging.units["fp32"] == pytest.approx(32 * (BLOCKS * EXTRA + WARPS), rel=0.03)


def test_the_path_is_the_busiest_warps(counted: dict[str, machine_code.Executed]) -> None:
    """A chain of multiplications takes their latency, each; the other warps wait."""
    chain = EXTRA * machine_code.LATENCY["fp32"]
    around = machine_code.LATENCY["l2"] + 350  # the load, the barrier, addresses
    path = of(counted, "diverging").path.cycles()
    assert chain < path - around < EXTRA * (machine_code.LATENCY["branch"] + 8)
    line = 1 + next(n for n, text in enumerate(PROGRAM.splitlines()) if "__fmul_rn" in text)
    assert of(counted, "diverging").path.steps[f"tiny.cu:{line}"] > chain
    straight = of(counted, "straight").path.cycles()
    assert straight == pytest.approx(
        100 * machine_code.LATENCY["fp32"] + machine_code.LATENCY["l2"], rel=0.25
    )


def test_the_path_is_one_blocks_in_grids_of_rows(
    counted: dict[str, machine_code.Executed],
) -> None:
    tall, straight = of(counted, "tall"), of(counted, "straight")
    assert tall.units["fp32"] == straight.units["fp32"]
    assert tall.path.cycles() == pytest.approx(straight.path.cycles(), rel=0.1)


def test_units_of_machine_instructions() -> None:
    expected = {
        "FFMA": "fp32",
        "IMAD.WIDE.U32": "imad",
        "FMNMX": "alu",
        "DADD": "fp64",
        "MUFU.RCP": "xu",
        "LDG.E.128.CONSTANT": "lsu",
        "UIADD3": "uniform",
        "BRA": "control",
    }
    assert {opcode: machine_code.unit_of(opcode) for opcode in expected} == expected
    assert [machine_code.slots_of(x) for x in ("LDS.128", "STS.64", "LDG.E", "FFMA")] == [
        4,
        2,
        1,
        1,
    ]


def test_what_ptx_says_about_machine_code() -> None:
    expected = {
        "add.rn.f32": "FADD",
        "fma.rn.f64": "DFMA",
        "ld.global.nc.v4.f32": "LDG",
        "st.shared.v4.f32": "STS",
        "bar.sync": "BAR",
        "add.s32": None,
        "ld.param.u64": None,
        "cvt.f32.f16": None,
    }
    assert {opcode: counters.telling(opcode) for opcode in expected} == expected


def test_blocks_of_ptx_are_counted_where_they_begin() -> None:
    text = """.version 9.0
.target sm_90
.address_size 64
.entry one(.param .u64 a)
{
\tmov.u32 %r1, 0;
$L__BB0_1:
\tadd.s32 %r1, %r1, 1;
\t@%p1 bra $L__BB0_1;
\t@%p2 ret;
\tmov.u32 %r2, 1;
\tret;
}
"""
    counted = counters.count_blocks(text, "counts")
    assert counted.blocks == 4
    assert [counted.line[n] for n in (6, 8, 9, 10, 11, 12)] == [
        ("mov.u32", 0),
        ("add.s32", 1),
        ("bra", 1),
        ("ret", 2),
        ("mov.u32", 3),
        ("ret", 3),
    ]
    assert f"counts[{(1 + counters.WARPS) * 4}]" in counted.text
    assert counted.text.count("ret;") == 1
    assert "@%p2 bra $tta_end0;" in counted.text


def instruction(opcode: str, operands: str = "") -> machine_code.Instruction:
    return machine_code.Instruction(opcode, False, operands, 0)


def test_registers_of_instructions() -> None:
    def registers(opcode: str, operands: str) -> tuple[list[str], list[str]]:
        return machine_code.registers_of(instruction(opcode, operands))

    assert registers("FFMA", "R1, R2.reuse, R3, -R4") == (["R1"], ["R2", "R3", "R4"])
    assert registers("DADD", "R4, R6, R8") == (["R4", "R5"], ["R6", "R7", "R8", "R9"])
    assert registers("LDG.E.128", "R4, desc[UR8][R2.64+0x10]") == (
        ["R4", "R5", "R6", "R7"],
        ["UR8", "R2", "R3"],
    )
    assert registers("STS.64", "[R7+0x20], R14") == ([], ["R7", "R14", "R15"])
    assert registers("SHFL.BFLY", "PT, R5, R4, 0x10, 0x1f") == (["R5"], ["R4"])
    assert registers("IADD3", "R4, P1, R2, R3, RZ") == (["R4", "P1"], ["R2", "R3"])
    assert registers("ISETP.GE.AND", "P0, PT, R3, R6, P2") == (["P0"], ["R3", "R6", "P2"])


def test_a_warp_alone_waits_for_operands_and_units() -> None:
    latency = machine_code.LATENCY

    def cycles(*instructions: machine_code.Instruction) -> int:
        block = machine_code.Block("", list(instructions))
        return sum(machine_code.LoneWarp().run(block).values())

    chain = [instruction("FADD", "R1, R1, R2")] * 10
    assert cycles(*chain) == 9 * latency["fp32"] + 1
    apart = [instruction("FADD", f"R{n}, R30, R31") for n in range(10)]
    assert cycles(*apart) == 10
    # Four lanes for conversions in each part of the SM: eight cycles for a warp.
    assert cycles(*[instruction("MUFU.EX2", f"R{n}, R30") for n in range(10)]) == 9 * 8 + 1
    load = instruction("LDG.E", "R1, desc[UR4][R2.64]")
    assert cycles(load, instruction("FADD", "R3, R1, R1")) == latency["l2"] + 1
    # A fence waits for what was stored.
    store = instruction("STG.E", "desc[UR4][R2.64], R1")
    assert cycles(store, instruction("MEMBAR.SC.GPU")) == latency["l2"] + 1


def test_what_only_divergent_warps_reach_does_not_run() -> None:
    listing = """.text.kernel:
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   BRA.DIV UR4, `(.L_x_1) ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R1, R1, R2 ;
.L_x_2:
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   WARPSYNC.COLLECTIVE R3, `(.L_x_3) ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_2) ;
"""
    blocks = machine_code.machine_blocks(listing)["kernel"]
    assert [len(block.instructions) for block in blocks] == [2, 1, 1, 1, 1, 1]
    assert machine_code.reached(blocks) == {0, 1, 2, 3}

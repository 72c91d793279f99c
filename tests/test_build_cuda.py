"""Building and loading the CUDA library: toolkits, architectures, switches, table of kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tta_ext._compile import BuildError

from tta_ext import _compile, _compile_cuda, jit, jit_cuda
from tta_ext.ops import _dispatch

ROOT = Path(__file__).resolve().parent.parent
KNOWN = frozenset(("75", "80", "86", "90", "90a", "100", "120"))
HOPPER = ("NVIDIA H100", (9, 0))


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No toolkit or architecture named from outside, nothing loaded before."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TTA_EXT_CUDA", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jit_cuda._once, "result", None)
    monkeypatch.setattr(_dispatch, "_cuda", None)


def fake_nvcc(home: Path, release: str, compiles: bool = True) -> Path:
    """A program that answers as nvcc does when it is asked who it is; what it compiles is empty."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    compiling = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda tools, release {release}, V{release}.1";;\n'
        '--list-gpu-code) printf "sm_80\\nsm_90\\nsm_90a\\n";;\n'
        f"*) {compiling if compiles else 'echo planted error: >&2; exit 1'};; esac\n"
    )
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("text", "gpus", "images"),
    [
        ("", [], "sm_80 sm_90 sm_100 compute_120 sm_120"),
        ("", [(9, 0)], "compute_90 sm_90"),
        ("", [(8, 0), (9, 0), (8, 0)], "sm_80 compute_90 sm_90"),
        ("", [(12, 1)], "compute_120"),  # newer than nvcc: PTX for the driver
        ("", [(7, 5), (8, 6)], "compute_86 sm_86"),
        ("8.0;9.0+PTX", [(12, 0)], "sm_80 compute_90 sm_90"),
        ("8.0 9.0a, 10.0", [], "sm_80 sm_90a sm_100"),
        ("7.5;8.0;13.0", [], "sm_80"),
    ],
)
def test_images(
    monkeypatch: pytest.MonkeyPatch, text: str, gpus: list[tuple[int, int]], images: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert _compile_cuda.images_to_build(KNOWN, gpus) == images.split()


def test_images_left_out_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;13.0")
    with caplog.at_level(logging.WARNING, logger="tta_ext"):
        _compile_cuda.images_to_build(KNOWN, ())
    (record,) = caplog.records
    assert "sm_130 sm_75" in record.getMessage()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hopper", "'Hopper', which is no architecture such as 9.0"),
        ("9", "'9', which is no architecture"),
        ("7.5", "no architecture is left of sm_75"),
    ],
)
def test_bad_architectures(monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(BuildError) as error:
        _compile_cuda.images_to_build(KNOWN, ())
    assert words in str(error.value)
    assert "export TORCH_CUDA_ARCH_LIST=" in str(error.value)


@pytest.mark.parametrize(
    ("image", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100f", (10, 3), True),
        ("sm_100a", (10, 3), False),
        ("sm_120", (12, 1), True),
        ("compute_80", (12, 0), True),
        ("compute_90", (8, 9), False),
        ("compute_100f", (12, 0), False),
    ],
)
def test_what_runs_where(image: str, capability: tuple[int, int], runs: bool) -> None:
    assert _compile_cuda.runs_on(image, capability) is runs


def test_unserved_gpu_is_one_sentence() -> None:
    jit_cuda.check_images(["sm_90"], [HOPPER], "the library")
    with pytest.raises(BuildError) as error:
        jit_cuda.check_images(["sm_80", "compute_100"], [HOPPER], "the library")
    text = str(error.value)
    assert "NVIDIA H100 has compute capability 9.0" in text
    assert "sm_80 compute_100" in text
    assert "export TORCH_CUDA_ARCH_LIST=9.0" in text
    assert "\n" not in text


# ---------------------------------------------------------------------------- toolkits


def test_toolkit_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path / "home", "13.2")
    other = fake_nvcc(tmp_path / "path", "12.4")
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CXX", raising=False)
    assert _compile_cuda.find_toolkit().release == "12.4"
    monkeypatch.setenv("CUDA_PATH", str(home.parent.parent))
    found = _compile_cuda.find_toolkit()
    assert (found.release, found.compiler.command) == ("13.2", (str(home),))
    assert found.known == {"80", "90", "90a"}
    _compile_cuda.check_release(found, "13.0")
    with pytest.raises(BuildError, match=r"of CUDA 13\.2, torch of CUDA 12\.8; mend it with: "):
        _compile_cuda.check_release(found, "12.8")


def test_missing_toolkit_says_what_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="nvcc in CUDA_HOME, CUDA_PATH and on the PATH"):
        _compile_cuda.find_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"CUDA_HOME='.*' has no bin/nvcc"):
        _compile_cuda.find_toolkit()


def test_host_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXX", f"env {compiler}")
    assert _compile_cuda.host_compiler() == (f"-ccbin={compiler}",)
    monkeypatch.setenv("NVCC_CCBIN", "clang++")
    assert _compile_cuda.host_compiler() == ()


def test_key_depends_on_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "csrc"
    for name in ("core/a.h", "cuda/a.cu", "cuda/a.cuh", "bind/cuda.cpp", "bind/cpu.cpp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)

    def key(version: str = "nvcc 1", torch_version: str = "2", images: str = "sm_90") -> str:
        compiler = _compile.Compiler(("nvcc",), version)
        toolkit = _compile_cuda.Toolkit(compiler, "13.0", KNOWN)
        return _compile_cuda.build_key(root, toolkit, torch_version, images.split())

    keys = {key(), key(version="nvcc 2"), key(torch_version="3"), key(images="sm_90 sm_100")}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    keys.add(key())
    assert len(keys) == 5
    on_cpu = _compile.source_digest(root)
    for name in ("cuda/a.cu", "cuda/a.cuh", "bind/cuda.cpp", "core/a.h"):
        (root / name).write_text("changed")
        assert key() not in keys
        keys.add(key())
        # A kernel's change must not have everybody compile the CPU library again.
        assert (_compile.source_digest(root) == on_cpu) is (name != "core/a.h")


def test_cmake_has_the_same_kernels() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    (pattern,) = re.findall(r"file\(GLOB TTA_EXT_CUDA_SOURCES CONFIGURE_DEPENDS (\S+)\)", text)
    kernels = [path for path in _compile_cuda.sources(ROOT / "csrc") if path.suffix == ".cu"]
    assert sorted(ROOT.glob(pattern)) == kernels
    assert kernels
    for flag in ("--fmad=false", "-lineinfo", "-ffp-contract=off", "-fno-math-errno"):
        assert flag in text
        assert any(flag in words for words in _compile_cuda.FLAGS)


# ---------------------------------------------------------------------------- wheels


class Wheel:
    """setup.py's build of the libraries beside a torch and a CUDA toolkit that are made up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.library = folder / "out" / "tta_ext" / "_C_cuda.so"

    def torch(self, cuda: str | None) -> None:
        package = self.folder / "site" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__version__ = '2.14.1'\ncuda = {cuda!r}\n")

    def build(self, **variables: str) -> tuple[int, list[str]]:
        """Exit code, and lines on stderr."""
        base, temp = self.folder / "out", self.folder / "temp"
        done = subprocess.run(
            [
                *(sys.executable, "setup.py", "-q", "build_ext"),
                *("--build-lib", str(base), "--build-temp", str(temp)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "CUDA_HOME": str(self.folder / "home"),
                "PYTHONPATH": str(self.folder / "site"),
                "TTA_EXT_NATIVE": "0",
                **variables,
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr.splitlines()

    def record(self) -> dict[str, object]:
        return json.loads(self.library.with_suffix(".json").read_text())


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return Wheel(tmp_path)


# A driver that shows one GPU of compute capability 8.0.
DRIVER = """
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int) { *device = 7; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : 0;
  return device != 7 || (attribute != 75 && attribute != 76);
}
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the driver's library is Linux's")
@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_wheel_carries_kernels_for_the_gpus_of_the_machine(wheel: Wheel, wanted: str) -> None:
    wheel.torch("13.0")
    fake_nvcc(wheel.folder / "home", "13.2")
    source = wheel.folder / "driver.cpp"
    source.write_text(DRIVER)
    compiler = _compile.find_compiler().command
    subprocess.run(
        [*compiler, "-shared", "-fPIC", source, "-o", wheel.folder / "libcuda.so.1"], check=True
    )
    gpu = {"LD_LIBRARY_PATH": str(wheel.folder), "TTA_EXT_CUDA": wanted}
    assert wheel.build(**gpu) == (0, [])
    assert wheel.library.exists()
    assert wheel.record() == {
        "digest": _compile_cuda.source_digest(ROOT / "csrc"),
        "compiler": "nvcc V13.2.1",
        "images": ["compute_80", "sm_80"],
        "cuda": "13.0",
    }
    assert wheel.build(**gpu, TORCH_CUDA_ARCH_LIST="9.0") == (0, [])
    assert wheel.record()["images"] == ["sm_90"]


@pytest.mark.parametrize(
    ("cuda", "release", "reason"),
    [
        (None, "13.0", "torch 2.14.1 is built without CUDA; install a CUDA build of torch"),
        ("13.0", "12.4", "is of CUDA 12.4, torch of CUDA 13.0; mend it with: export CUDA_HOME="),
        ("13.0", None, "no CUDA compiler: CUDA_HOME="),
    ],
)
def test_wheel_says_why_it_has_no_kernels(
    wheel: Wheel, cuda: str | None, release: str | None, reason: str
) -> None:
    """One sentence by default, an error where they are demanded, nothing where they are not."""
    wheel.torch(cuda)
    if release is not None:
        fake_nvcc(wheel.folder / "home", release)
    code, (line,) = wheel.build()
    assert code == 0
    assert line.startswith("tta_ext: the first op compiles the CUDA library: ")
    assert reason in line
    code, (line,) = wheel.build(TTA_EXT_CUDA="1")
    assert code == 1
    assert line.startswith("TTA_EXT_CUDA=1, but ")
    assert reason in line
    assert wheel.build(TTA_EXT_CUDA="0") == (0, [])
    assert not wheel.library.exists()


def test_wheel_survives_a_toolkit_that_does_not_compile(wheel: Wheel) -> None:
    wheel.torch("13.0")
    fake_nvcc(wheel.folder / "home", "13.0", compiles=False)
    code, lines = wheel.build(TORCH_CUDA_ARCH_LIST="9.0")
    assert code == 0
    assert lines[0] == "tta_ext: the first op compiles the CUDA library: it does not compile now:"
    assert "planted error:" in lines
    code, lines = wheel.build(TORCH_CUDA_ARCH_LIST="9.0", TTA_EXT_CUDA="1")
    assert code == 1
    assert lines[0] == "tta_ext: _C_cuda.so does not compile:"
    assert not wheel.library.exists()


def test_isolated_build_is_quiet(wheel: Wheel) -> None:
    """Without torch: one sentence for both libraries, and no toolkit is asked."""
    site = wheel.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
    )
    code, (line,) = wheel.build(TTA_EXT_NATIVE="auto")
    assert code == 0
    assert line.startswith(
        "tta_ext: the first op compiles the CPU and the CUDA library: torch is not installed"
    )


# ---------------------------------------------------------------------------- loading


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTA_EXT_CUDA", "0")
    assert jit_cuda.load().reason == "switched off by TTA_EXT_CUDA=0"
    monkeypatch.setattr(jit_cuda._once, "result", None)
    monkeypatch.setenv("TTA_EXT_CUDA", "yes")
    with pytest.raises(ValueError, match="TTA_EXT_CUDA='yes' is not one of auto, 0, 1"):
        jit_cuda.load()


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent by default, because nothing is slower for it; one sentence where CUDA is demanded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = jit_cuda.load()
    assert not result.loaded
    assert "is built without CUDA" in result.reason
    assert _dispatch.serves("philox", "cuda") == ("reference", result.reason)
    monkeypatch.setattr(jit_cuda._once, "result", None)
    monkeypatch.setenv("TTA_EXT_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"^TTA_EXT_CUDA=1, but torch .* built without CUDA"):
        jit_cuda.load()


def test_a_gpu_without_kernels_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(wanted: str) -> None:
        raise BuildError("no CUDA compiler; mend it with: something")

    monkeypatch.setattr(jit_cuda, "_load", fail)
    monkeypatch.setattr(jit_cuda, "gpus", lambda: [HOPPER])
    with pytest.warns(jit.NativeWarning, match=r"reference on CUDA tensors.*no CUDA compiler") as w:
        results = [jit_cuda.load() for _ in range(3)]
    assert len(w) == 1
    assert not any(result.loaded for result in results)


def test_prebuilt_library_must_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of another CUDA, for other GPUs: passed over, and the reason is kept."""
    library = tmp_path / "_C_cuda.so"
    record = {"cuda": "13.0", "images": ["sm_80"]}
    library.with_suffix(".json").write_text(json.dumps(record))
    monkeypatch.setattr(jit, "prebuilt", lambda name, digest: (library, ""))
    assert jit_cuda._prebuilt("13.1", [("NVIDIA A100", (8, 0))]) == (library, "")
    assert "is for CUDA 13.0, torch has CUDA 12.8" in jit_cuda._prebuilt("12.8", [])[1]
    path, why = jit_cuda._prebuilt("13.0", [HOPPER])
    assert path is None
    assert "NVIDIA H100 has compute capability 9.0" in why


# ---------------------------------------------------------------------------- what nvcc makes


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "kernel_table", ROOT / "scripts" / "kernel_table.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_table"] = module
    spec.loader.exec_module(module)
    return module


def test_occupancy(table: ModuleType) -> None:
    """By hand: 64 registers of 256 threads are a quarter of an SM's; 100 KiB of shared memory fill
    one of sm_120 and two of sm_90.
    """
    assert table.occupancy("90", 256, 64, 0) == (4, 0.5, "registers")
    assert table.occupancy("90", 256, 32, 0) == (8, 1.0, "warps")
    assert table.occupancy("120", 128, 16, 0) == (12, 1.0, "warps")
    assert table.occupancy("120", 128, 16, 99 * 1024) == (1, 4 / 48, "shared")
    assert table.occupancy("90", 128, 16, 100 * 1024) == (2, 8 / 64, "shared")
    assert table.occupancy("80", 32, 16, 0) == (32, 0.5, "blocks")
    assert table.occupancy("80", 256, 96, 0)[0] == 2


def test_recorded_kernels_are_clean(table: ModuleType) -> None:
    record, kernels = table.recorded()
    assert record["sources"] == table.digests(), "run: python scripts/kernel_table.py"
    assert table.faults(kernels) == []
    assert {kernel.arch for kernel in kernels} == {
        f"sm_{number}" for number in _compile_cuda.ARCHITECTURES
    }
    assert {kernel.file for kernel in kernels} == {path.name for path in table.sources()}
    assert table.render(kernels, str(record["compiler"])) == table.TEXT.read_text()


@pytest.mark.parametrize(
    ("change", "problem"),
    [({}, ""), ({"stack": 8}, "a stack of 8 bytes"), ({"registers": 1}, "not what nvcc gives")],
)
def test_without_cuobjdump_the_reports_of_ptxas_are_checked(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], problem: str
) -> None:
    record, kernels = table.recorded()
    names = [field.name for field in dataclasses.fields(table.Assembled)]
    reports = [table.Assembled(**{name: getattr(k, name) for name in names}) for k in kernels]
    reports[0] = dataclasses.replace(reports[0], **change)

    def measure(compile_file: object, toolkit: object, files: object) -> list[object]:
        assert compile_file is table.assemble_one
        return reports

    monkeypatch.setattr(table, "measure", measure)
    compiler = SimpleNamespace(version=record["compiler"])
    found = table.check(SimpleNamespace(compiler=compiler), dumps=False)
    assert [problem in line for line in found] == [True] * bool(problem)


def test_local_memory_is_found(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A planted array that no register can hold; the kernel beside it is clean."""
    try:
        toolkit = _compile_cuda.find_toolkit()
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
    monkeypatch.setattr(table, "CSRC", tmp_path)
    # By what ptxas reports, and where its tools are with a look at the machine code.
    reported = sorted(table.assemble_one(toolkit, source, "80"), key=lambda k: k.kernel)
    assert [k.kernel for k in reported] == ["planted<64>", "wide"]
    assert "a stack of 256 bytes" in reported[0].fault()
    assert reported[1].fault() == ""
    try:
        table.tool("cuobjdump")
    except BuildError as error:
        pytest.skip(f"the reports of ptxas were looked at, not the machine code: {error}")
    planted, wide = sorted(table.compile_one(toolkit, source, "90"), key=lambda k: k.kernel)
    assert (planted.kernel, planted.threads) == ("planted<64>", 128)
    assert planted.stack >= 256
    assert "local memory" in planted.fault()
    assert wide.fault() == ""
    assert (wide.kernel, wide.loads_128, wide.stores_128, wide.loads_64) == ("wide", 1, 1, 0)

"""Building and loading the CUDA library: toolkits, architectures, switches, kernels that spill."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import fake_nvcc

from tta_ext import build, dispatch
from tta_ext.build import LIBRARIES, BuildError, Library, cuda, files
from tta_ext.build.cuda import CudaLibrary, gpus
from tta_ext.build.toolchain import Compiler, Torch

ROOT = Path(__file__).resolve().parent.parent
KNOWN = frozenset(("75", "80", "86", "90", "90a", "100", "120"))
AMPERE, HOPPER = ("NVIDIA A100", (8, 0)), ("NVIDIA H100", (9, 0))
TORCH = Torch(Path("/torch"), "2.14.1", "13.0")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No toolkit, architecture or GPU from outside, nothing loaded before."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TTA_EXT_CUDA", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "gpus", list)
    monkeypatch.setitem(LIBRARIES, "cuda", CudaLibrary())
    monkeypatch.setattr(dispatch, "_status", {})


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
    monkeypatch.setattr(cuda, "gpus", lambda: [("a GPU", capability) for capability in gpus])
    assert cuda.images_to_build(KNOWN) == images.split()


def test_images_left_out_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;13.0")
    with caplog.at_level(logging.WARNING, logger="tta_ext"):
        cuda.images_to_build(KNOWN)
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
        cuda.images_to_build(KNOWN)
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
    assert cuda.runs_on(image, capability) is runs


def test_unserved_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old card beside it, which nothing can serve, does not count."""
    monkeypatch.setattr(cuda, "gpus", lambda: [("NVIDIA T4", (7, 5)), HOPPER])
    record = {"cuda": "13.2", "images": ["sm_90"]}
    CudaLibrary().check(record, TORCH)
    with pytest.raises(BuildError) as error:
        CudaLibrary().check({**record, "images": ["sm_80", "compute_100"]}, TORCH)
    text = str(error.value)
    assert "NVIDIA H100 has compute capability 9.0" in text
    assert "sm_80 compute_100" in text
    assert "export TORCH_CUDA_ARCH_LIST=9.0" in text
    assert "\n" not in text


def test_a_broken_driver_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*number: int) -> bool:
        raise RuntimeError("no such driver")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", fail)
    with pytest.raises(BuildError, match=r"asked for its GPUs \(RuntimeError: no such driver\); "):
        gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: HOPPER[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: HOPPER[1])
    assert gpus() == [HOPPER]


# ---------------------------------------------------------------------------- toolkits


def test_toolkit_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path / "home", "13.2")
    other = fake_nvcc(tmp_path / "path", "12.4")
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CXX", raising=False)
    assert cuda.find_toolkit().release == "12.4"
    monkeypatch.setenv("CUDA_PATH", str(home.parent.parent))
    found = cuda.find_toolkit()
    assert (found.release, found.compiler.command) == ("13.2", (str(home),))
    assert found.known == {"80", "90", "90a"}
    cuda.check_release(found, "13.0")
    with pytest.raises(BuildError, match=r"of CUDA 13\.2, torch of CUDA 12\.8; mend it with: "):
        cuda.check_release(found, "12.8")


def test_missing_toolkit_says_what_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as error:
        cuda.find_toolkit("13.2")
    assert str(error.value) == (
        "no CUDA compiler: looked for nvcc in CUDA_HOME, CUDA_PATH, on the PATH and in "
        "site-packages/nvidia; mend it with: pip install 'cuda-toolkit[nvcc]==13.2.*', or export "
        "CUDA_HOME=<the folder of a CUDA 13 toolkit>"
    )
    with pytest.raises(BuildError, match=r"mend it with: conda install .* cuda-nvcc=12\.8, or exp"):
        cuda.find_toolkit("12.8")  # of CUDA 12 pip has no nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"CUDA_HOME='.*' has no bin/nvcc"):
        cuda.find_toolkit()


PARTS = {
    "nvidia-cuda-nvcc": "bin/ptxas",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "include/cuda_runtime.h",
}


def pip_toolkit(
    monkeypatch: pytest.MonkeyPatch, site: Path, release: str = "13.0", **others: str
) -> Path:
    """nvcc as pip installs it, and its parts of the same or of other releases; None: missing."""
    nvcc = fake_nvcc(site / "nvidia" / f"cu{release.split('.')[0]}", release)
    for name, file in PARTS.items():
        path = nvcc.parent.parent / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if others.get(name) != "missing":
            path.touch()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: f"{others.get(name, release)}.88"
    )
    return nvcc


def test_pips_toolkit_comes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    installed = pip_toolkit(monkeypatch, tmp_path / "site")
    assert cuda.find_toolkit("13.0").compiler.command == (str(installed),)
    assert cuda.find_toolkit().compiler.command == (str(installed),)
    with pytest.raises(BuildError, match="no CUDA compiler: looked"):
        cuda.find_toolkit("12.8")
    old = fake_nvcc(tmp_path / "old", "12.4")
    monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
    assert cuda.find_toolkit().release == "12.4"
    assert cuda.find_toolkit("12.8").release == "12.4"
    assert cuda.find_toolkit("13.0").release == "13.0"  # that of the PATH would not do
    named = fake_nvcc(tmp_path / "named", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(named.parent.parent))
    assert cuda.find_toolkit("13.0").release == "13.2"


@pytest.mark.parametrize(
    ("name", "release"), [("nvidia-nvvm", "13.5"), ("nvidia-cuda-crt", "missing")]
)
def test_parts_of_pips_toolkit_must_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, release: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    pip_toolkit(monkeypatch, tmp_path / "site", **{name: release})
    with pytest.raises(BuildError) as error:
        cuda.find_toolkit("13.0")
    assert f"{name} {release}" in str(error.value)
    assert "mend it with: pip install 'cuda-toolkit[nvcc]==13.0.*'" in str(error.value)


def test_the_runtime_is_linked_by_its_file_where_it_has_no_plain_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = pip_toolkit(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    toolkit = cuda.find_toolkit("13.0")
    assert cuda._runtime(toolkit) == ("-cudart=shared",)
    library = nvcc.parent.parent / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    assert cuda._runtime(toolkit) == ("-cudart=none", f"-Xlinker={library}")
    library.with_name("libcudart.so").touch()
    assert cuda._runtime(toolkit) == ("-cudart=shared",)


def test_host_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXX", f"env {compiler}")
    assert cuda.host_compiler() == (f"-ccbin={compiler}",)
    monkeypatch.setenv("NVCC_CCBIN", "clang++")
    assert cuda.host_compiler() == ()


@pytest.mark.usefixtures("cxx")
def test_key_depends_on_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "csrc"
    for name in ("core/a.h", "cuda/a.cu", "cuda/a.cuh", "bind/cuda.cpp", "bind/cpu.cpp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)

    def key(version: str = "nvcc 1", torch_version: str = "2", images: str = "9.0") -> str:
        toolkit = cuda.Toolkit(Compiler(("nvcc",), version), "13.0", KNOWN)
        monkeypatch.setattr(cuda, "find_toolkit", lambda cuda: toolkit)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", images)
        return CudaLibrary(root).recipe(dataclasses.replace(TORCH, version=torch_version)).key()

    keys = {key(), key(version="nvcc 2"), key(torch_version="3"), key(images="9.0 10.0")}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    keys.add(key())
    host = Compiler(("c++",), "another release")
    monkeypatch.setattr("tta_ext.build.library.find_compiler", lambda: host)
    keys.add(key())
    assert len(keys) == 6
    on_cpu = Library(root).digest()
    for name in ("cuda/a.cu", "cuda/a.cuh", "bind/cuda.cpp", "core/a.h"):
        (root / name).write_text("changed")
        assert key() not in keys
        keys.add(key())
        # A kernel's change must not have everybody compile the CPU library again.
        assert (Library(root).digest() == on_cpu) is (name != "core/a.h")


def test_variants_are_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """One library for the same choice, however it is written."""
    for text in ("typed,float-division", "float-division; typed", "typed float-division typed"):
        monkeypatch.setenv("TTA_EXT_CUDA_VARIANT", text)
        assert cuda.variant_flags() == list(cuda.VARIANTS.values())
    monkeypatch.setenv("TTA_EXT_CUDA_VARIANT", "typed,slow")
    with pytest.raises(BuildError, match="TTA_EXT_CUDA_VARIANT has 'slow'"):
        cuda.variant_flags()


def test_cmake_has_the_same_kernels() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    (pattern,) = re.findall(r"file\(GLOB TTA_EXT_CUDA_SOURCES CONFIGURE_DEPENDS (\S+)\)", text)
    kernels = [path for path in CudaLibrary(ROOT / "csrc").sources() if path.suffix == ".cu"]
    assert sorted(ROOT.glob(pattern)) == kernels
    assert kernels
    for flag in ("--fmad=false", "-lineinfo", "-ffp-contract=off", "-fno-math-errno"):
        assert flag in text
        assert any(flag in words for words in cuda.FLAGS)


# ---------------------------------------------------------------------------- loading


def in_torch(monkeypatch: pytest.MonkeyPatch, cuda_version: str | None) -> None:
    """As if the torch of this environment had this CUDA."""
    found = dataclasses.replace(TORCH, cuda=cuda_version)
    monkeypatch.setattr("tta_ext.build.library.find_torch", lambda: found)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTA_EXT_CUDA", "0")
    off = "switched off by TTA_EXT_CUDA=0; mend it with: unset TTA_EXT_CUDA"
    assert build.load("cuda").reason == off
    monkeypatch.setenv("TTA_EXT_CUDA", "yes")
    with pytest.raises(ValueError, match="TTA_EXT_CUDA='yes' is not one of auto, 0, 1"):
        CudaLibrary().load()


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize(
    ("version", "reason", "demanded"),
    [
        (None, "is built without CUDA", "torch 2.14.1 is built without CUDA"),
        ("13.0", "torch finds no CUDA device", "no CUDA compiler: CUDA_HOME='/none' has no"),
    ],
)
def test_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str, demanded: str
) -> None:
    """Silent by default, because nothing is slower for it; one sentence where CUDA is demanded."""
    in_torch(monkeypatch, version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = build.load("cuda")
    assert not result.loaded
    assert reason in result.reason
    assert dispatch.serves("philox", "cuda") == ("reference", result.reason)
    monkeypatch.setenv("TTA_EXT_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", "/none")
    with pytest.raises(RuntimeError, match=f"^TTA_EXT_CUDA=1, but {demanded}"):
        CudaLibrary().load()


def test_a_gpu_without_kernels_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(torch: Torch) -> None:
        raise BuildError("no CUDA compiler; mend it with: something")

    in_torch(monkeypatch, "13.0")
    monkeypatch.setattr(LIBRARIES["cuda"], "recipe", fail)
    monkeypatch.setattr(cuda, "gpus", lambda: [HOPPER])
    with pytest.warns(build.NativeWarning, match=r"reference on CUDA.*no CUDA compiler") as w:
        results = [build.load("cuda") for _ in range(3)]
    assert len(w) == 1
    assert w[0].filename == __file__
    assert not any(result.loaded for result in results)


@pytest.mark.usefixtures("cxx")
def test_prebuilt_library_must_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of another CUDA, for other GPUs, of other sources: passed over, and the reason is kept."""
    monkeypatch.setattr("tta_ext.build.library.PACKAGE", tmp_path)
    monkeypatch.setattr("tta_ext.build.library._open", lambda path, kind: None)
    monkeypatch.setattr("tta_ext.build.cache.get", lambda recipe, stem: (tmp_path, True))
    library = CudaLibrary(ROOT / "csrc")
    prebuilt = tmp_path / library.name
    prebuilt.touch()
    record = {
        "digest": library.digest(),
        "cuda": "13.0",
        "images": ["sm_80"],
        **files.stamp(b""),
    }

    def reason(version: str, gpu: cuda.Gpu, **changes: str) -> str:
        prebuilt.with_suffix(".json").write_text(json.dumps({**record, **changes}))
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / version, version).parent.parent))
        monkeypatch.setattr(cuda, "gpus", lambda: [gpu])
        in_torch(monkeypatch, version)
        return CudaLibrary(ROOT / "csrc").load().reason

    assert reason("13.1", AMPERE) == "prebuilt in the package, for sm_80"
    compiled = "compiled in the cache, for compute_{0} sm_{0}; "
    assert reason("12.8", AMPERE) == compiled.format(80) + (
        "the prebuilt library is for CUDA 13.0, torch has CUDA 12.8"
    )
    other_gpu = reason("13.0", HOPPER)
    assert other_gpu.startswith(compiled.format(90) + "the GPU NVIDIA H100 has compute capability ")
    assert "the CUDA library holds sm_80" in other_gpu
    assert reason("13.2", AMPERE, digest="?") == compiled.format(80) + (
        "the prebuilt library is older than the C++ sources"
    )


# ---------------------------------------------------------------------------- what nvcc makes


def test_local_memory_is_found(tmp_path: Path) -> None:
    """A planted array that no register can hold; the kernel beside it is clean."""
    try:
        toolkit = cuda.find_toolkit()
    except BuildError as error:
        pytest.skip(str(error))
    path = ROOT / ".ci" / "spills.py"
    if not path.exists():
        pytest.skip("only a checkout has .ci/spills.py")
    spec = importlib.util.spec_from_file_location("spills", path)
    assert spec is not None and spec.loader is not None
    spills = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spills)
    clean = tmp_path / "clean.cu"
    clean.write_text("__global__ void wide(float4* y) { y[threadIdx.x].x = y[0].y; }\n")
    assert spills.fault(toolkit, clean, "80") == ""
    planted = tmp_path / "planted.cu"
    planted.write_text(
        clean.read_text() + "__global__ void planted(const int* i, float* x) {\n"
        "  float a[64];\n"
        "  for (int k = 0; k < 64; ++k) a[k] = x[k];\n"
        "  a[i[threadIdx.x]] = 1.0f;\n"
        "  for (int k = 0; k < 64; ++k) x[k * 128 + threadIdx.x] = a[(k + i[0]) % 64];\n"
        "}\n"
    )
    found = spills.fault(toolkit, planted, "80")
    assert found.startswith("planted.cu, sm_80\n")
    assert "planted" in found.partition("\n")[2]
    assert "Local memory used" in found
    assert "wide" not in found

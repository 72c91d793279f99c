"""What setup.py makes: wheels with the sources, and with the libraries where they can be built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import fake_nvcc

from tta_ext.build import LIBRARIES, BuildError, Library, files
from tta_ext.build.cuda import CudaLibrary
from tta_ext.build.toolchain import Torch

ROOT = Path(__file__).resolve().parent.parent


def copy_tree(target: Path) -> Path:
    """What a build needs of the checkout, elsewhere, so that it leaves nothing behind."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    for name in ("tta_ext", "csrc", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "_C.*", "results")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def files_of(wheels: Path) -> list[str]:
    """The wheel's name, then those of the files in it."""
    (wheel,) = wheels.glob("*.whl")
    return [wheel.name, *zipfile.ZipFile(wheel).namelist()]


def test_plain_wheel_carries_the_sources(tmp_path: Path) -> None:
    tree, out = copy_tree(tmp_path / "tree"), tmp_path / "out"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "-w", str(out), str(tree)],
        check=True,
        capture_output=True,
        env={**os.environ, "TTA_EXT_NATIVE": "0", "TTA_EXT_CUDA": "0"},
    )
    name, *files = files_of(out)
    assert re.fullmatch(r"tta_ext-[\w.]+-py3-none-any\.whl", name)
    root = ROOT / "csrc"
    for library in (type(library)(root) for library in LIBRARIES.values()):
        for path in (*library.sources(), *library.headers()):
            assert f"tta_ext/_csrc/{path.relative_to(root).as_posix()}" in files
    assert {"tta_ext/py.typed", "tta_ext/build/__init__.py"} <= set(files)
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert not [file for file in files if "testing" in file or "results" in file]
    tops = {file.split("/")[0] for file in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tta_ext"}
    assets = [path for path in (ROOT / "tta_ext" / "assets").rglob("*") if path.is_file()]
    for path in assets:
        if path.suffix != ".pyc":
            assert path.relative_to(ROOT).as_posix() in files


@pytest.mark.usefixtures("cxx")
def test_prebuilt_wheel_carries_the_library(tiny: Library, tmp_path: Path) -> None:
    tree, out = copy_tree(tmp_path / "tree"), tmp_path / "out"
    shutil.rmtree(tree / "csrc")
    shutil.copytree(tiny.root, tree / "csrc")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(out)],
        check=True,
        capture_output=True,
        cwd=tree,
        env={**os.environ, "TTA_EXT_NATIVE": "1", "TTA_EXT_CUDA": "0"},
    )
    name, *files = files_of(out)
    assert re.fullmatch(r"tta_ext-[\w.]+-py3-none-(?!any)\w+\.whl", name)
    assert {"tta_ext/_C.so", "tta_ext/_C.json"} <= set(files)
    # It loads where there is no compiler, and is passed over when the sources beside it differ.
    site = tmp_path / "site"
    zipfile.ZipFile(out / name).extractall(site)
    code = (
        "from tta_ext import build\n"
        "result = build.load('cpu')\n"
        "assert result.reason == 'prebuilt in the package', result\n"
        "with (build.LIBRARIES['cpu'].root / 'core' / 'answer.h').open('a') as header:\n"
        "    header.write('// changed')\n"
        "print(build.Library().load().reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.startswith("no C++ compiler: CXX='no-such-compiler'"), done.stderr


# ---------------------------------------------------------------------------- CUDA


class Build:
    """setup.py's build of the libraries beside a torch and a CUDA toolkit that are made up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.library = folder / "out" / "tta_ext" / "_C_cuda.so"

    def torch(self, cuda: str | None, gpu: tuple[int, int] | None = None) -> None:
        package = self.folder / "site" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(
            "import torch.version as version\n"
            "class cuda:\n"
            f"    is_available = staticmethod(lambda: {gpu is not None})\n"
            "    device_count = staticmethod(lambda: 1)\n"
            "    get_device_name = staticmethod(lambda i: 'a GPU')\n"
            f"    get_device_capability = staticmethod(lambda i: {gpu})\n"
        )
        (package / "version.py").write_text(f"__version__ = '2.14.1'\ncuda = {cuda!r}\n")

    def __call__(self, **variables: str) -> tuple[int, list[str]]:
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
def build(monkeypatch: pytest.MonkeyPatch, cxx: None, tmp_path: Path) -> Build:
    for name in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TTA_EXT_CUDA", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    return Build(tmp_path)


def test_wheel_carries_kernels_for_the_gpus_of_the_machine(build: Build) -> None:
    build.torch("13.0", gpu=(8, 0))
    fake_nvcc(build.folder / "home", "13.2")
    assert build() == (0, [])
    assert build.library.exists()
    assert build.record() == {
        "digest": CudaLibrary(ROOT / "csrc").digest(),
        "compiler": "nvcc V13.2.1",
        "images": ["compute_80", "sm_80"],
        "cuda": "13.0",
        "variant": [],
        **files.stamp(b""),
    }
    assert build(TTA_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0") == (0, [])
    assert build.record()["images"] == ["sm_90"]


def test_wheel_says_why_it_has_no_kernels(build: Build) -> None:
    """One sentence by default, an error where they are demanded, nothing where they are not."""
    build.torch("13.0")
    fake_nvcc(build.folder / "home", "12.4")
    reason = "is of CUDA 12.4, torch of CUDA 13.0; mend it with: pip install 'cuda-toolkit[nvcc]=="
    code, (line,) = build()
    assert code == 0
    assert line.startswith("tta_ext: the first op compiles the CUDA library: ")
    assert reason in line
    code, (line,) = build(TTA_EXT_CUDA="1")
    assert code == 1
    assert line.startswith("TTA_EXT_CUDA=1, but ")
    assert reason in line
    assert build(TTA_EXT_CUDA="0") == (0, [])
    code, lines = build(TTA_EXT_CUDA="yes")
    assert (code, lines) == (1, ["TTA_EXT_CUDA='yes' is not one of auto, 0, 1"])
    assert not build.library.exists()


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, "torch 2.14.1 is built without CUDA; install a CUDA build of torch"),
        ("13.0", "no CUDA compiler: CUDA_HOME="),
    ],
)
def test_reasons_for_no_kernels(
    build: Build, monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(build.folder / "home"))
    with pytest.raises(BuildError) as error:
        CudaLibrary().recipe(Torch(build.folder, "2.14.1", cuda))
    assert reason in str(error.value)


def test_wheel_survives_a_toolkit_that_does_not_compile(build: Build) -> None:
    build.torch("13.0")
    fake_nvcc(build.folder / "home", "13.0", compiles=False)
    code, lines = build(TORCH_CUDA_ARCH_LIST="9.0")
    assert code == 0
    assert lines[0] == "tta_ext: the first op compiles the CUDA library: it does not compile now:"
    assert "planted error:" in lines
    code, lines = build(TORCH_CUDA_ARCH_LIST="9.0", TTA_EXT_CUDA="1")
    assert code == 1
    assert lines[0] == "tta_ext: _C_cuda.so does not compile:"
    assert not build.library.exists()


def test_isolated_build_is_quiet(build: Build) -> None:
    """Without torch: one sentence for both libraries, and no toolkit is asked."""
    site = build.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
    )
    code, (line,) = build(TTA_EXT_NATIVE="auto")
    assert code == 0
    assert line.startswith(
        "tta_ext: the first op compiles the CPU and the CUDA library: torch is not installed"
    )


ALONE = """
import torch, tta_ext
from tta_ext import build, schemas
from tta_ext.build import cuda
assert torch.version.cuda, torch.__version__
nvcc = cuda.find_toolkit(torch.version.cuda).compiler.command[0]
result = build.load("cuda")
assert result.loaded and result.built, result
assert torch.ops.tta_ext.cuda_version() == schemas.NATIVE_VERSION
assert cuda.CudaLibrary().load().path == result.path  # and from the cache
print(nvcc, result.reason.partition(";")[0], sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cxx")
def test_the_cuda_extra_is_a_toolkit(tmp_path: Path) -> None:
    """A clean environment gets a CUDA build of torch and ``tta-ext[cuda]`` from the package index:
    several GB. ``TTA_EXT_CUDA_VENV`` names one that may be used instead, with torch in it.
    """
    given = os.environ.get("TTA_EXT_CUDA_VENV")
    venv = Path(given or tmp_path / "venv")
    if not given:
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR") or "PIP_" in k}
    environment = {
        **kept,
        "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
        "TTA_EXT_CACHE_DIR": str(tmp_path / "cache"),
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    tree = copy_tree(tmp_path / "tree")
    # Only the sources: the library is built by the first call.
    without = {"TTA_EXT_NATIVE": "0", "TTA_EXT_CUDA": "0"}
    command = [python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(tree)]
    for installing in ([*command[:5], f"{tree}[cuda]"], command):
        subprocess.run(installing, check=True, env=environment | without, cwd=tmp_path)
    done = subprocess.run(
        [python, "-c", ALONE],
        env=environment | {"TTA_EXT_NATIVE": "0", "TTA_EXT_CUDA": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    nvcc, reason = done.stdout.splitlines()
    assert Path(nvcc).is_relative_to(venv)
    assert reason == "compiled in the cache, for sm_90"

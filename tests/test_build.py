"""Building and loading the CPU library: names, missing compilers, switches, lean import."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from tta_ext import build
from tta_ext.build import LIBRARIES, Library, cache, toolchain
from tta_ext.build.toolchain import CXX_FLAGS, Compiler, find_torch

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------- import


def test_env_report_and_import_without_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path hook hides torch: the report still prints, the import says one sentence."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    report = subprocess.run(
        [sys.executable, "-m", "tta_ext.env"], capture_output=True, text=True, cwd=tmp_path
    )
    assert report.returncode == 0, report.stderr
    assert "pip install torch" in report.stdout
    failed = subprocess.run(
        [sys.executable, "-c", "from tta_ext import ops"], capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "pip install torch" in failed.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------------------- names


def test_key_depends_on_everything(tiny: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tta_ext.build.library.find_compiler", lambda: Compiler(("c++",), "c++ 12"))
    torch = replace(find_torch(), version="2.13.0")
    recipe = tiny.recipe(torch)
    key = recipe.key()
    assert re.fullmatch("[0-9a-f]{64}", key)
    keys = {
        key,
        tiny.recipe(replace(torch, version="2.14.0")).key(),
        replace(recipe, compiler=Compiler(("g++",), "c++ 12")).key(),
        replace(recipe, compiler=Compiler(("c++",), "c++ 13")).key(),
        replace(recipe, flags=(*CXX_FLAGS, "-g")).key(),
        replace(recipe, more=("Python 3",)).key(),
    }
    files = (*tiny.sources(), *tiny.headers())
    for path in files:
        text = path.read_text()
        path.write_text(text + "// changed\n")
        keys.add(tiny.recipe(torch).key())
        path.write_text(text)
    (tiny.root / "core" / "more.h").write_text("")
    keys.add(tiny.recipe(torch).key())
    (tiny.root / "core" / "more.h").unlink()
    assert len(keys) == 7 + len(files) == 10
    # Times of modification and development files play no part.
    os.utime(tiny.root / "core" / "answer.h", (0, 0))
    (tiny.root / "testing").mkdir()
    (tiny.root / "testing" / "test_answer.cpp").write_text("int main() {}")
    assert tiny.recipe(torch).key() == key


def test_cmake_has_the_same_sources() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    patterns = re.findall(
        r"file\(GLOB TTA_EXT_(?:KERNEL|BIND)_SOURCES CONFIGURE_DEPENDS (\S+)\)", text
    )
    assert len(patterns) == 2
    listed = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert listed == Library(ROOT / "csrc").sources()
    assert listed
    for flag in CXX_FLAGS:
        spelled = {
            "-std=c++17": "CMAKE_CXX_STANDARD 17",
            "-fPIC": "CMAKE_POSITION_INDEPENDENT_CODE ON",
            "-fvisibility=hidden": "CMAKE_CXX_VISIBILITY_PRESET hidden",
        }.get(flag, flag.removeprefix("-D"))
        assert spelled in text, flag


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TTA_EXT_CACHE_DIR", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.delenv("TTA_EXT_CACHE_DIR")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.cache_dir() == tmp_path / "tta_ext"


# ---------------------------------------------------------------------------- loading


@pytest.mark.usefixtures("cxx")
def test_threads_share_one_load(tiny: Library, caplog: pytest.LogCaptureFixture) -> None:
    results = []
    threads = [threading.Thread(target=lambda: results.append(tiny.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(map(id, results))) == 1
    assert results[0].loaded
    assert results[0].built
    assert results[0].reason.startswith("compiled in the cache; ")
    assert caplog.text.count("compiling") == 1
    again = Library(tiny.root).load()
    assert (again.path, again.built) == (results[0].path, False)
    assert again.reason.startswith("found in the cache; ")


@pytest.mark.usefixtures("cxx")
def test_damaged_cache_entry_is_rebuilt(tiny: Library) -> None:
    path, _ = cache.get(tiny.recipe(find_torch()), "cpu")
    path.write_bytes(b"not a library")
    result = tiny.load()
    assert result.built
    assert result.path == path
    assert ctypes.CDLL(str(path)).tta_answer() == 42


def refused(library: Library) -> tuple[str, list[str]]:
    """Why a library is not loaded, and what two calls warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = library.load()
        assert library.load() is result
    assert not result.loaded
    assert all(issubclass(warning.category, build.NativeWarning) for warning in caught)
    return result.reason, [str(warning.message) for warning in caught]


@pytest.mark.usefixtures("cxx")
def test_compile_error_is_one_sentence(tiny: Library) -> None:
    (tiny.root / "cpu" / "answer.cpp").write_text("int answer() { return forty_two; }\n")
    reason, warned = refused(tiny)
    assert "forty_two" in reason
    assert "\n" not in reason
    assert len(warned) == 1
    assert "forty_two" in next(cache.cache_dir().glob("*.log")).read_text()


def test_no_compiler_says_so_once(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason, warned = refused(tiny)
    assert "no C++ compiler: looked for c++, g++, clang++" in reason
    assert "mend it with: " in reason
    assert len(warned) == 1
    assert reason in warned[0]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "TTA_EXT_NATIVE",
            "0",
            "switched off by TTA_EXT_NATIVE=0; mend it with: unset TTA_EXT_NATIVE",
        ),
        ("CXX", "no-such-compiler -m64", "CXX='no-such-compiler -m64' is not on the PATH"),
        ("CXX", "false", "does not run"),
        ("TTA_EXT_CACHE_DIR", "/dev/null/cache", "export TTA_EXT_CACHE_DIR="),
    ],
)
def test_switches(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    reason, warned = refused(tiny)
    assert words in reason
    assert len(warned) == (0 if name == "TTA_EXT_NATIVE" else 1)


def test_loud_switches(tiny: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TTA_EXT_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"^TTA_EXT_NATIVE=1, but no C\+\+ compiler"):
        tiny.load()
    monkeypatch.setenv("TTA_EXT_NATIVE", "yes")
    with pytest.raises(ValueError, match=r"^TTA_EXT_NATIVE='yes' is not one of auto, 0, 1"):
        tiny.load()


def test_torch_must_be_there_and_new_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", {"torch": spec}.get)
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\ncuda: str | None = None\n")
    with pytest.raises(build.BuildError, match=r"torch 2\.9\.1\+cpu is older than 2\.10, .*pip in"):
        find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.10.0a0'\ncuda: str | None = '13.0'\n")
    assert find_torch() == toolchain.Torch(tmp_path.resolve(), "2.10.0a0", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    with pytest.raises(build.BuildError, match=r"not installed.*pip install --no-build-isolation"):
        find_torch()


# ---------------------------------------------------------------------------- the library


@pytest.fixture(scope="module")
def library() -> Path:
    """The real CPU library of this checkout."""
    result = build.load("cpu")
    if not result.loaded:
        pytest.skip(result.reason)
    assert result.path is not None
    return result.path


def test_library_has_no_cuda_symbol(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    out = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in out.stdout.splitlines() if line]
    assert symbols
    assert not [
        name for name in symbols if re.search("cuda|cudart|nvrtc|cublas", name, re.IGNORECASE)
    ]
    # Of torch, the stable C interface only: no C++ symbol, which may change with each release.
    undefined = [line.split()[-1] for line in out.stdout.splitlines() if line.split()[-2] == "U"]
    assert not [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]


def test_a_warm_load_asks_only_the_compilers_version(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = subprocess.Popen.__init__

    def note(self: subprocess.Popen, command: list[str], *more: object, **options: object) -> None:
        started.append(command[-1])
        start(self, command, *more, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", note)
    result = Library().load()
    assert (result.path, result.built) == (library, False)
    assert started in (["--version"], [])  # nothing if it is prebuilt


def test_scalar_only_build(library: Path) -> None:
    """The sources compile with the compiler's baseline instruction set only, and compute."""
    recipe = LIBRARIES["cpu"].recipe(find_torch())
    # Unoptimized, which takes half the time.
    recipe = replace(recipe, flags=(*CXX_FLAGS, "-O0", "-DTTA_X86_64=0"))
    path, _ = cache.get(recipe, "scalar")
    code = """
import sys, torch, tta_ext.schemas
torch.ops.load_library(sys.argv[1])
assert torch.ops.tta_ext.cpu_isa(2) == 0
counter = torch.zeros(1, 4, dtype=torch.int64); out = torch.empty_like(counter)
torch.ops.tta_ext.philox.out(counter, torch.zeros(2, dtype=torch.int64), out=out)
assert [f"{int(x):08x}" for x in out[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"], out
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------- doctor and README


def test_doctor_names_a_backend_for_every_op() -> None:
    from tta_ext import doctor

    diagnosis = doctor.diagnose()
    assert {"deferral_sample", "greedy_knapsack", "philox"} <= {op.name for op in diagnosis.ops}
    for op in diagnosis.ops:
        assert op.backend in ("cpu", "reference")
        assert op.backend == "cpu" or op.why_not["cpu"]
    text = doctor.render(diagnosis)
    assert all(op.name in text for op in diagnosis.ops)


def test_doctor_says_what_would_make_an_op_faster(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tta_ext import dispatch, doctor

    assert doctor.served("philox") == {"cpu": ("cpu", "")}
    why = "no CUDA compiler: looked for nvcc; mend it with: pip install something"
    monkeypatch.setitem(dispatch._status, "cuda", why)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    assert doctor.served("philox") == {
        "cpu": ("cpu", ""),
        "cuda": ("reference", "pip install something"),
    }
    monkeypatch.setattr(doctor.env, "collect", lambda: {"GPUs": "one"})
    assert "faster with: pip install something  (every op)" in doctor.render(doctor.diagnose())


def test_readme_opens_with_two_one_line_commands() -> None:
    blocks = re.findall(
        r"^```(?:sh|bash|shell)\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    demo, tests = (block.strip() for block in blocks[:2])
    for command in (demo, tests):
        assert "\n" not in command
        assert "-c constraints.txt" in command
    assert "tta demo" in demo
    assert "pytest" in tests
    assert "ci_readme_command 2" in (ROOT / ".ci" / "run").read_text()

"""Packaging and the on-the-fly build: names, locks, kills, missing compilers, lean import."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tta_ext import _compile, _compile_cuda, jit

ROOT = Path(__file__).resolve().parent.parent
DUMMY = {
    "core/answer.h": "#pragma once\nint answer();\n",
    "cpu/answer.cpp": '#include "core/answer.h"\nint answer() { return 42; }\n',
    "bind/cpu.cpp": """
#include "core/answer.h"
#include <torch/csrc/stable/library.h>
static void boxed(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(static_cast<int64_t>(answer()));
}
STABLE_TORCH_LIBRARY_FRAGMENT(tta_ext_dummy, m) { m.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(tta_ext_dummy, CompositeExplicitAutograd, m) { m.impl("answer", &boxed); }
""",
}
# Loads the dummy library in a process of its own: one process cannot register an op twice.
LOAD = """
import json, sys, time, warnings
from pathlib import Path
import torch
from tta_ext import _compile, jit
_compile.source_root = lambda: Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = jit.load()
    again = jit.load()
assert again is result
print(json.dumps({
    "loaded": result.loaded, "reason": result.reason, "path": str(result.path),
    "seconds": result.seconds, "built": result.built, "warnings": [str(w.message) for w in caught],
    "answer": torch.ops.tta_ext_dummy.answer() if result.loaded else None,
}))
"""

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler"
)


@pytest.fixture
def dummy(tmp_path: Path) -> Path:
    """A small C++ tree in the layout of csrc, quick to compile."""
    root = tmp_path / "csrc"
    for name, text in DUMMY.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    names = ("TTA_EXT_NATIVE", "CXX", "MAX_JOBS", "TTA_EXT_LOCK_TIMEOUT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env["TTA_EXT_CACHE_DIR"] = str(tmp_path / "cache")
    # Locks of their own, so that a test never waits for another run's.
    env["TMPDIR"] = str(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return {**env, **changes}


def start(dummy: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(dummy)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out), err


def load(dummy: Path, env: dict[str, str]) -> tuple[dict, str]:
    return finish(start(dummy, env))


def slow_compiler(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A compiler that notes each compilation and waits while a gate file is there."""
    script, calls, gate = tmp_path / "cxx", tmp_path / "calls", tmp_path / "gate"
    real = shutil.which("c++") or shutil.which("g++")
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) ;; *) echo x >> {calls}\n'
        f"  while [ -e {gate} ]; do sleep 0.05; done ;; esac\n"
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    return script, calls, gate


def wait_for(condition, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.02)


# ---------------------------------------------------------------------------- import


def test_env_report_and_import_without_torch(tmp_path: Path) -> None:
    """A path hook hides torch: the report still prints, the import says one sentence."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    env = environment(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), env["PYTHONPATH"]))
    report = subprocess.run(
        [sys.executable, "-m", "tta_ext.env"], env=env, capture_output=True, text=True
    )
    assert report.returncode == 0, report.stderr
    assert "pip install torch" in report.stdout
    failed = subprocess.run(
        [sys.executable, "-c", "from tta_ext import ops"], env=env, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "pip install torch" in failed.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------------------- names


def test_build_key_depends_on_everything(dummy: Path) -> None:
    compiler = _compile.Compiler(("c++",), "c++ 12")
    key = _compile.build_key(dummy, compiler, "2.13.0")
    assert re.fullmatch("[0-9a-f]{64}", key)
    keys = {
        key,
        _compile.build_key(dummy, compiler, "2.14.0"),
        _compile.build_key(dummy, _compile.Compiler(("g++",), "c++ 12"), "2.13.0"),
        _compile.build_key(dummy, _compile.Compiler(("c++",), "c++ 13"), "2.13.0"),
        _compile.build_key(dummy, compiler, "2.13.0", (*_compile.CXX_FLAGS, "-g")),
    }
    for name in DUMMY:
        path = dummy / name
        text = path.read_text()
        path.write_text(text + "// changed\n")
        keys.add(_compile.build_key(dummy, compiler, "2.13.0"))
        path.write_text(text)
    (dummy / "core" / "more.h").write_text("")
    keys.add(_compile.build_key(dummy, compiler, "2.13.0"))
    (dummy / "core" / "more.h").unlink()
    assert len(keys) == 6 + len(DUMMY)
    # Times of modification and development files play no part.
    os.utime(dummy / "core" / "answer.h", (0, 0))
    (dummy / "testing").mkdir()
    (dummy / "testing" / "test_answer.cpp").write_text("int main() {}")
    assert _compile.build_key(dummy, compiler, "2.13.0") == key


def test_cmake_has_the_same_sources() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    patterns = re.findall(
        r"file\(GLOB TTA_EXT_(?:KERNEL|BIND)_SOURCES CONFIGURE_DEPENDS (\S+)\)", text
    )
    assert len(patterns) == 2
    listed = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert listed == _compile.cpu_sources(ROOT / "csrc")
    assert listed
    for flag in _compile.CXX_FLAGS:
        spelled = {
            "-std=c++17": "CMAKE_CXX_STANDARD 17",
            "-fPIC": "CMAKE_POSITION_INDEPENDENT_CODE ON",
            "-fvisibility=hidden": "CMAKE_CXX_VISIBILITY_PRESET hidden",
        }.get(flag, flag.removeprefix("-D"))
        assert spelled in text, flag


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TTA_EXT_CACHE_DIR", str(tmp_path))
    assert jit.cache_dir() == tmp_path
    monkeypatch.delenv("TTA_EXT_CACHE_DIR")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert jit.cache_dir() == tmp_path / "tta_ext"


# ---------------------------------------------------------------------------- builds


@needs_compiler
def test_builds_once_then_loads_from_the_cache(dummy: Path, tmp_path: Path) -> None:
    env = environment(tmp_path)
    first, log = load(dummy, env)
    assert first["built"]
    assert first["answer"] == 42
    assert log.count("compiling") == 1
    assert len(log.strip().splitlines()) == 1
    second, log = load(dummy, env)
    assert second["loaded"]
    assert not second["built"]
    assert second["path"] == first["path"]
    assert log == ""
    (folder,) = (tmp_path / "cache").iterdir()  # no temporary folder, no log
    assert sorted(path.name for path in folder.iterdir()) == ["_C.so", "build.json"]


@needs_compiler
def test_many_processes_compile_once(dummy: Path, tmp_path: Path) -> None:
    script, calls, gate = slow_compiler(tmp_path)
    gate.touch()
    env = environment(tmp_path, CXX=str(script))
    processes = [start(dummy, env) for _ in range(4)]
    wait_for(calls.exists)
    time.sleep(1.0)  # let the others reach the lock
    gate.unlink()
    results = [finish(process) for process in processes]
    assert all(result["answer"] == 42 for result, _ in results)
    assert sum(result["built"] for result, _ in results) == 1
    assert len(calls.read_text().split()) == 3  # two files and a link


@needs_compiler
def test_killed_half_way(dummy: Path, tmp_path: Path) -> None:
    script, calls, gate = slow_compiler(tmp_path)
    gate.touch()
    env = environment(tmp_path, CXX=str(script))
    cache = tmp_path / "cache"
    victim = start(dummy, env)
    wait_for(calls.exists)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    left = list(cache.glob(".tmp-*"))
    assert left, "it was killed while compiling"
    assert not list(cache.glob("cpu-*/_C.so"))
    gate.unlink()
    wait_for(lambda: len(list(cache.glob(".tmp-*/*.o"))) == 2)  # the orphaned compilers end
    for path in left:
        os.utime(path, (0, 0))  # a day passes
    result, _ = load(dummy, env)
    assert result["built"]
    assert result["answer"] == 42
    assert not list(cache.glob(".tmp-*"))


@needs_compiler
def test_lock_timeout_names_its_owner(dummy: Path, tmp_path: Path) -> None:
    script, calls, gate = slow_compiler(tmp_path)
    gate.touch()
    env = environment(tmp_path, CXX=str(script))
    owner = start(dummy, env)
    wait_for(calls.exists)
    late, _ = load(dummy, {**env, "TTA_EXT_LOCK_TIMEOUT": "0.2"})
    assert not late["loaded"]
    assert f"process {owner.pid} on" in late["reason"]
    gate.unlink()
    assert finish(owner)[0]["built"]


@needs_compiler
def test_damaged_cache_entry_is_rebuilt(dummy: Path, tmp_path: Path) -> None:
    env = environment(tmp_path)
    first, _ = load(dummy, env)
    Path(first["path"]).write_bytes(b"not a library")
    second, _ = load(dummy, env)
    assert second["built"]
    assert second["answer"] == 42


@needs_compiler
def test_compile_error_is_one_sentence(dummy: Path, tmp_path: Path) -> None:
    (dummy / "cpu" / "answer.cpp").write_text("int answer() { return forty_two; }\n")
    result, _ = load(dummy, environment(tmp_path))
    assert not result["loaded"]
    assert "forty_two" in result["reason"]
    assert "\n" not in result["reason"]
    assert len(result["warnings"]) == 1
    assert "forty_two" in next((tmp_path / "cache").glob("*.log")).read_text()


@needs_compiler
def test_threads_share_one_load(dummy: Path, tmp_path: Path) -> None:
    code = """
import sys, threading
from pathlib import Path
import torch
from tta_ext import _compile, jit
_compile.source_root = lambda: Path(sys.argv[1])
results = []
threads = [threading.Thread(target=lambda: results.append(jit.load())) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(results) == 8 and len(set(map(id, results))) == 1 and results[0].loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(dummy)],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiling") == 1


# ---------------------------------------------------------------------------- switches


def test_no_compiler_says_so_once(dummy: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result, _ = load(dummy, environment(tmp_path, PATH=str(empty)))
    assert not result["loaded"]
    assert "no C++ compiler: looked for c++, g++, clang++" in result["reason"]
    assert "mend it with: " in result["reason"]
    assert len(result["warnings"]) == 1
    assert result["reason"] in result["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TTA_EXT_NATIVE": "0"}, "switched off by TTA_EXT_NATIVE=0"),
        ({"CXX": "no-such-compiler -m64"}, "CXX='no-such-compiler -m64' is not on the PATH"),
        ({"CXX": "false"}, "does not run"),
        ({"TTA_EXT_CACHE_DIR": "/dev/null/cache"}, "export TTA_EXT_CACHE_DIR="),
    ],
)
def test_switches(dummy: Path, tmp_path: Path, changes: dict[str, str], words: str) -> None:
    result, _ = load(dummy, environment(tmp_path, **changes))
    assert not result["loaded"]
    assert words in result["reason"]
    assert len(result["warnings"]) == (0 if "TTA_EXT_NATIVE" in changes else 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"TTA_EXT_NATIVE": "1", "CXX": "no-such-compiler"},
            "RuntimeError: TTA_EXT_NATIVE=1, but no C++ compiler",
        ),
        ({"TTA_EXT_NATIVE": "yes"}, "ValueError: TTA_EXT_NATIVE='yes' is not one of auto, 0, 1"),
    ],
)
def test_loud_switches(dummy: Path, tmp_path: Path, changes: dict[str, str], words: str) -> None:
    process = start(dummy, environment(tmp_path, **changes))
    _, err = process.communicate()
    assert process.returncode == 1
    assert words in err.strip().splitlines()[-1]


def test_fork_gets_a_fresh_lock() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = """
import os, threading
from tta_ext import jit
jit._once._lock.acquire()
child = os.fork()
if child == 0:
    os._exit(0 if jit._once._lock.acquire(timeout=5) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------- wheels


def build_wheel(tree: Path, out: Path, native: str) -> list[str]:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"),
            *("--no-build-isolation", "-w", str(out), str(tree)),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "TTA_EXT_NATIVE": native, "TTA_EXT_CUDA": "0"},
    )
    (wheel,) = out.glob("*.whl")
    return [wheel.name, *zipfile.ZipFile(wheel).namelist()]


def copy_tree(target: Path) -> Path:
    """What a build needs of the checkout, elsewhere, so that it leaves nothing behind."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    for name in ("tta_ext", "csrc", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "_C.*", "results")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def test_plain_wheel_carries_the_sources(tmp_path: Path) -> None:
    name, *files = build_wheel(copy_tree(tmp_path / "tree"), tmp_path / "out", "0")
    assert re.fullmatch(r"tta_ext-[\w.]+-py3-none-any\.whl", name)
    root = ROOT / "csrc"
    on_cpu = (*_compile.cpu_sources(root), *_compile.cpu_headers(root))
    for path in (*on_cpu, *_compile_cuda.sources(root), *_compile_cuda.headers(root)):
        assert f"tta_ext/_csrc/{path.relative_to(root).as_posix()}" in files
    assert "tta_ext/py.typed" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert not [file for file in files if "testing" in file or "results" in file]
    tops = {file.split("/")[0] for file in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tta_ext"}
    assets = [path for path in (ROOT / "tta_ext" / "assets").rglob("*") if path.is_file()]
    for path in assets:
        if path.suffix != ".pyc":
            assert path.relative_to(ROOT).as_posix() in files


@needs_compiler
def test_prebuilt_wheel_carries_the_library(dummy: Path, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    shutil.rmtree(tree / "csrc")
    shutil.copytree(dummy, tree / "csrc")
    name, *files = build_wheel(tree, tmp_path / "out", "1")
    assert re.fullmatch(r"tta_ext-[\w.]+-py3-none-(?!any)\w+\.whl", name)
    assert "tta_ext/_C.so" in files
    # It loads where there is no compiler, and is passed over when the sources beside it differ.
    site = tmp_path / "site"
    zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))).extractall(site)
    env = environment(tmp_path, CXX="no-such-compiler", PYTHONPATH=str(site))
    code = LOAD.replace("_compile.source_root = lambda: Path(sys.argv[1])\n", "")
    command = [sys.executable, "-c", code, "unused"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(out.stdout)["reason"] == "prebuilt in the package", out.stderr
    with (site / "tta_ext" / "_csrc" / "core" / "answer.h").open("a") as header:
        header.write("// changed\n")
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert not json.loads(out.stdout)["loaded"], out.stderr


# ---------------------------------------------------------------------------- the library


@pytest.fixture(scope="module")
def library() -> Path:
    """The real CPU library of this checkout."""
    result = jit.load()
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


def test_library_loads_warm_in_a_fifth_of_a_second(library: Path) -> None:
    """Processor time of the process and of the compiler it asks for its version."""
    code = """
import os, torch, tta_ext
from tta_ext import jit
before = sum(os.times()[:4])
assert not jit.load().built
print(sum(os.times()[:4]) - before)
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(out.stdout) < 0.2


def test_scalar_only_build(library: Path, tmp_path: Path) -> None:
    """The sources compile with the compiler's baseline instruction set only, and compute."""
    import torch

    flags = (*_compile.CXX_FLAGS, "-DTTA_X86_64=0")
    root = _compile.source_root()
    out = tmp_path / "_C.so"
    _compile.compile_library(
        _compile.find_compiler(),
        _compile.cpu_sources(root),
        out,
        include_dirs=[root],
        torch_root=Path(torch.__file__).parent,
        flags=flags,
    )
    code = """
import sys, torch, tta_ext.schemas
torch.ops.load_library(sys.argv[1])
assert torch.ops.tta_ext.cpu_isa(2) == 0
counter = torch.zeros(1, 4, dtype=torch.int64); out = torch.empty_like(counter)
torch.ops.tta_ext.philox.out(counter, torch.zeros(2, dtype=torch.int64), out=out)
assert [f"{int(x):08x}" for x in out[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"], out
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True
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


def test_readme_examples_run() -> None:
    """Every Python block of the README, as it stands."""
    pytest.importorskip("transformers")
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

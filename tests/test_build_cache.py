"""The cache of compiled libraries: names, locks, many processes, kills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tta_ext.build import Library, cache

ROOT = Path(__file__).resolve().parent.parent
# A process that builds the tiny library, as in setup.py without tta_ext itself and so without
# torch.
PROCESS = """
import ctypes, json, os, sys
from pathlib import Path
from types import ModuleType
package, root = sys.argv[1:]
sys.modules["tta_ext"] = ModuleType("tta_ext")
sys.modules["tta_ext"].__path__ = [package]
from tta_ext.build import BuildError, Library, cache
try:
    path, built = cache.get(Library(Path(root)).recipe(None), "cpu")
except BuildError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"path": str(path), "built": built, "answer": ctypes.CDLL(path).tta_answer()}))
"""

pytestmark = pytest.mark.usefixtures("cxx")


class Process:
    """One that builds the tiny library; its log is written to a file."""

    def __init__(self, library: Library, **changes: str) -> None:
        self.log = Path(tempfile.mkdtemp()) / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(ROOT / "tta_ext"), str(library.root)],
                env={**os.environ, **changes},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def finish(self) -> dict:
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.log.read_text()
        return json.loads(out)


@pytest.fixture
def slow(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Library, Path, Path]:
    """The tiny library; a file that notes each compilation; a gate that holds compilers up."""
    script, calls, gate = tmp_path / "cxx", tmp_path / "calls", tmp_path / "gate"
    real = shutil.which("c++") or shutil.which("g++")
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) ;; *) echo x >> {calls}\n'
        f"  while [ -e {gate} ]; do sleep 0.05; done ;; esac\n"
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    gate.touch()
    monkeypatch.setenv("CXX", str(script))
    return tiny, calls, gate


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 600  # what hangs shall end; no measure of speed
    while not condition():
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.02)


def test_builds_once_then_serves_from_the_cache(tiny: Library) -> None:
    process = Process(tiny)
    first, log = process.finish(), process.log.read_text()
    assert first["built"]
    assert first["answer"] == 42
    begun, ended = log.strip().splitlines()
    assert "compiling" in begun
    assert "compiled in" in ended
    process = Process(tiny)
    second = process.finish()
    assert second == {**first, "built": False}
    assert process.log.read_text() == ""
    (folder,) = cache.cache_dir().iterdir()  # no temporary folder, no log
    assert sorted(path.name for path in folder.iterdir()) == ["_C.so", "build.json"]


def test_many_processes_compile_once(slow: tuple[Library, Path, Path]) -> None:
    library, calls, gate = slow
    processes = [Process(library) for _ in range(8)]
    wait_for(lambda: sum("waiting for process" in p.log.read_text() for p in processes) == 7)
    gate.unlink()
    results = [process.finish() for process in processes]
    assert all(result["answer"] == 42 for result in results)
    assert sum(result["built"] for result in results) == 1
    assert len(calls.read_text().split()) == 3  # two files and a link


def test_killed_half_way(slow: tuple[Library, Path, Path]) -> None:
    library, calls, gate = slow
    victim = Process(library, MAX_JOBS="2")
    wait_for(lambda: calls.exists() and len(calls.read_text().split()) == 2)
    victim.process.kill()
    victim.process.communicate()
    folder = cache.cache_dir()
    left = list(folder.glob(".tmp-*"))
    assert left, "it was killed while compiling"
    assert not list(folder.glob("cpu-*/_C.so"))
    gate.unlink()
    wait_for(lambda: len(list(folder.glob(".tmp-*/*.o"))) == 2)  # the orphaned compilers end
    for path in left:
        os.utime(path, (0, 0))  # a day passes
    result = Process(library).finish()
    assert result["built"]
    assert result["answer"] == 42
    assert not list(folder.glob(".tmp-*"))


def test_lock_timeout_names_its_owner(slow: tuple[Library, Path, Path]) -> None:
    library, calls, gate = slow
    owner = Process(library)
    wait_for(calls.exists)
    late = Process(library, TTA_EXT_LOCK_TIMEOUT="0.2").finish()
    assert f"process {owner.process.pid} on" in late["error"]
    assert "export TTA_EXT_LOCK_TIMEOUT=" in late["error"]
    gate.unlink()
    assert owner.finish()["built"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_gets_a_fresh_lock() -> None:
    code = PROCESS[: PROCESS.index("try:")] + (
        "lock = Library(Path(root))\n"
        "lock._lock.acquire()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if lock._lock.acquire(timeout=5) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "tta_ext"), "unused"], check=True)

"""The Triton backend: its kernels in the interpreter, its code for GPUs, and when it is chosen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import skip_or_fail

from tta_ext import dispatch, schemas

ROOT = Path(__file__).resolve().parent.parent
# One that searches, one that compares with the base alone, one that reads both models.
FEW_RULES = "knapsack or argmax or proxy_above"


@pytest.fixture
def _triton() -> None:
    if importlib.util.find_spec("triton") is None:
        skip_or_fail("triton", "triton is not installed (it comes with tta-ext[test] on Linux)")
    found = version("triton")  # of what torch brings: torch 2.10 has an older one
    if tuple(int(part) for part in found.split(".")[:2]) < dispatch.TRITON_VERSION:
        skip_or_fail("triton", f"triton is {found}")


def run(*command: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.mark.usefixtures("_triton", "native")
@pytest.mark.parametrize(
    "part",
    [
        f"cut or budgets or deferral and ({FEW_RULES})",
        pytest.param(f"deferral and not ({FEW_RULES})", marks=pytest.mark.slow),
        pytest.param("verify", marks=pytest.mark.slow),
        pytest.param("not (cut or budgets or deferral or verify)", marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_the_cpus_in_the_interpreter(part: str) -> None:
    """In processes of their own: Triton decides at its import whether kernels are interpreted."""
    run("pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_kernels.py", "-k", part,
        TRITON_INTERPRET="1")  # fmt: skip


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_without_a_gpu(target: str, tmp_path: Path) -> None:
    """The kernel that most operators begin with; tools/triton compiles all of them."""
    kernel = "tile_stats RULE=0, T=4, no law, no active"
    run("tools.triton.ahead", "--only", kernel, "--targets", target,
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))  # fmt: skip


def test_triton_serves_gpus_without_a_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unasked, but only there, and only what it has a kernel of."""
    monkeypatch.setattr(dispatch, "triton_status", lambda device: "")
    monkeypatch.setattr(
        dispatch, "triton_kernel", lambda name: None if name == "greedy_knapsack" else print
    )
    for name in schemas.OPS:
        wanted = "reference" if name == "greedy_knapsack" else "triton"
        assert dispatch.serves(name, "xpu") == (
            wanted,
            f"no compiled xpu kernel of {name} is loaded",
        )
    monkeypatch.setitem(dispatch._status, "cpu", "no compiler")
    assert dispatch.serves("philox", "cpu") == ("reference", "no compiler")


def test_what_keeps_triton_from_serving_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    status = dispatch.triton_status.__wrapped__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert status("cuda") == "triton is not installed; mend it with: pip install triton"
    old = types.ModuleType("triton")
    old.__version__ = "3.2.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    assert status("cuda").startswith("triton is 3.2.0, expected 3.6 or newer")

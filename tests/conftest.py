"""Fixtures: backends, instruction sets, threads, a tiny library to build; skips that
``TTA_EXT_REQUIRE`` makes failures.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tta_ext
from tta_ext import dispatch
from tta_ext.build import BuildError, Library
from tta_ext.build.toolchain import find_compiler

ISA_LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2}
REQUIRED = frozenset(filter(None, os.environ.get("TTA_EXT_REQUIRE", "").split(",")))
# Processes that need not import torch once more.
forks = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork here"
)
# In the layout of csrc; without torch's headers a file compiles in no time.
_TINY = {
    "core/answer.h": "#pragma once\nint answer();\n",
    "cpu/answer.cpp": '#include "core/answer.h"\nint answer() { return 42; }\n',
    "bind/cpu.cpp": '#include "core/answer.h"\n'
    'extern "C" __attribute__((visibility("default"))) int tta_answer() { return answer(); }\n',
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: exhaustive or long; run by .ci/full")
    config.addinivalue_line("markers", "requires_cuda: needs a CUDA device")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def skip_or_fail(requirement: str, reason: str) -> None:
    """Skip, unless ``TTA_EXT_REQUIRE`` lists the requirement."""
    if requirement in REQUIRED:
        pytest.fail(f"TTA_EXT_REQUIRE={requirement}, but {reason}")
    pytest.skip(reason)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: pass --slow")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)


@pytest.fixture(autouse=True)
def _cuda_requirement(request: pytest.FixtureRequest) -> None:
    if "requires_cuda" in request.keywords and not torch.cuda.is_available():
        skip_or_fail("cuda", "no CUDA device")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Every test starts with one thread and leaves the number as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native() -> None:
    """The compiled CPU library; skips where it cannot be had."""
    reason = dispatch.native_status()
    if reason:
        skip_or_fail("native", f"no native library: {reason}")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of this machine in turn, forced for the test."""
    name = request.param
    if name == "cpu":
        request.getfixturevalue("native")
    with tta_ext.use_backend(name):
        yield name


@pytest.fixture(params=sorted(ISA_LEVELS, key=ISA_LEVELS.__getitem__))
def isa(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    level = ISA_LEVELS[request.param]
    before = torch.ops.tta_ext.cpu_isa(-1)
    if torch.ops.tta_ext.cpu_isa(level) != level:
        torch.ops.tta_ext.cpu_isa(before)
        skip_or_fail(request.param, f"this machine has no {request.param}")
    yield request.param
    torch.ops.tta_ext.cpu_isa(before)


@pytest.fixture(scope="session")
def kad() -> Any:
    """Knapsack deferral from tests/models.py's base to its proxy."""
    from models import base_model, proxy_model

    return tta_ext.KnapsackDeferral(base_model(), proxy_model())


@pytest.fixture(scope="session")
def own() -> Any:
    """The shipped pair in our own loop, with which foreign engines are compared."""
    return tta_ext.KnapsackDeferral(*tta_ext.demo_pair())


@pytest.fixture(scope="session")
def prompts(own: Any) -> list[list[int]]:
    """Token ids of six of the pair's questions."""
    from tta_ext.demo.task import evaluation_problems

    return [own.tokenizer(one.prompt)["input_ids"] for one in evaluation_problems(6)]


@pytest.fixture
def cxx() -> None:
    """Skips where there is no C++ compiler."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    """A library that compiles in no time, not loaded yet, with a cache and locks of its own.

    Its C function ``tta_answer`` returns 42.
    """
    for name in ("TTA_EXT_NATIVE", "CXX", "MAX_JOBS", "TTA_EXT_LOCK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TTA_EXT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, text in _TINY.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Library(tmp_path / "csrc")


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

"""Fixtures: backends, instruction sets, threads; skips that ``TTA_EXT_REQUIRE`` makes failures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import tta_ext
from tta_ext.ops import _dispatch

ISA_LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2}
REQUIRED = frozenset(filter(None, os.environ.get("TTA_EXT_REQUIRE", "").split(",")))


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
    reason = _dispatch.native_status()
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

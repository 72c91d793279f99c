"""docs/guarantees.md: each guarantee names tests, and they are there; one is proved here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
GUARANTEES = re.split(r"^\*\*(?=\d+\. )", TEXT, flags=re.MULTILINE)[1:]


def test_guarantees_are_numbered() -> None:
    numbers = [int(one.split(".", 1)[0]) for one in GUARANTEES]
    assert numbers == [*range(1, len(numbers) + 1)]
    assert len(numbers) >= 20


def test_each_names_tests_that_are_there() -> None:
    found: dict[str, set[str]] = {}
    for one in GUARANTEES:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", one)
        assert named, f"no test proves guarantee {one[:60]}"
        assert one.count("::") == len(named), one
        for file, name in named:
            if file not in found:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                found[file] = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
            assert name in found[file], f"{file} has no {name}"
            assert name.startswith("test_")


SORTS = re.compile(
    r"\b(?:std::(?:stable_|partial_)?sort|nth_element|sort_heap|qsort|cub::|thrust::|argsort|topk"
    r"|torch\.(?:sort|msort)|tl\.sort)\b|\.sort\("
)


def test_nothing_sorts() -> None:
    """Neither kernels nor backends in Python call anything that does."""
    places = ("csrc/core", "csrc/cpu", "csrc/cuda", "csrc/bind", "tta_ext/backends", "tta_ext/ops")
    files = [file for place in places for file in sorted((ROOT / place).rglob("*.*"))]
    sources = [f for f in files if f.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")]
    assert len(sources) > 60
    calls = {f.name: SORTS.findall(f.read_text(encoding="utf-8")) for f in sources}
    assert not {name: found for name, found in calls.items() if found}
    assert SORTS.search("std::sort(a, b)") and SORTS.search("x.sort()")

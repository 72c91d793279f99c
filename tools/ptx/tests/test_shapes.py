"""tools/ptx/shapes.py: which row is the worst."""

from __future__ import annotations

import itertools

from tools.ptx import shapes
from tools.ptx.shapes import Cell


def test_the_worst_row_stands_beside_the_kind_one_of_its_type() -> None:
    axes = (shapes.OPS, ("float32", "float16"), shapes.SHAPES, shapes.BUDGETS)
    found = {Cell(*axis): 20.0 for axis in itertools.product(*axes)}
    found[Cell("mask", "float32", "zipf", 0.95)] = 29.0
    found[Cell("mask", "float32", "ties", 0.1)] = 28.0
    found[Cell("probs", "float16", "ties", 0.001)] = 31.0
    table = {(line[0], line[1]): line[2:] for line in shapes.lines(found)}
    assert table["deferral_mask", "float32"] == ["20.0", "29.0", "1.45", "zipf, 0.95"]
    assert table["deferral_probs", "float16"] == ["20.0", "31.0", "1.55 (over)", "ties, 0.001"]
    assert table["deferral_probs", "float32"][:3] == ["20.0", "20.0", "1.00"]
    chosen = shapes.worst(found, 2)
    assert len(chosen) == 3 * 2 * len(shapes.OPS)
    mask = [cell for cell in chosen if (cell.op, cell.dtype) == ("mask", "float32")]
    assert [(cell.shape, cell.budget) for cell in mask] == [
        shapes.KIND, ("zipf", 0.95), ("ties", 0.1)
    ]  # fmt: skip

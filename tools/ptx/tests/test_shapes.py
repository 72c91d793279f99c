"""tools/ptx/shapes.py: which row is the worst."""

from __future__ import annotations

import itertools

from tools.ptx import shapes


def test_the_worst_row_stands_beside_the_kind_one() -> None:
    cells = itertools.product(shapes.OPS, shapes.SHAPES, (0.001, 0.3, 0.95))
    found = dict.fromkeys(cells, 20.0)
    found["mask", "zipf", 0.95] = 29.0
    found["probs", "ties", 0.001] = 31.0
    table = {line[0]: line[1:] for line in shapes.lines(found)}
    assert table["deferral_mask"] == ["20.0", "29.0", "1.45", "zipf, 0.95"]
    assert table["deferral_probs"] == ["20.0", "31.0", "1.55 (over)", "ties, 0.001"]
    assert table["deferral_stats"][:3] == ["20.0", "20.0", "1.00"]

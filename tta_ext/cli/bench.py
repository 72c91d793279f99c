"""``tta bench``: the microbenchmarks."""

from __future__ import annotations

import typer

__all__ = ["bench"]


def bench(context: typer.Context) -> None:
    """Time the ops against what they replace; arguments go to `python -m benchmarks`."""
    from tta_ext.bench import main

    raise typer.Exit(main(context.args))

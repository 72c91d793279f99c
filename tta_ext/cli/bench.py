"""``tta bench``: the microbenchmarks of a checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

__all__ = ["bench"]


def bench(context: typer.Context) -> None:
    """Time the ops against what they replace; arguments go to `python -m benchmarks`.

    The benchmarks are part of the repository, not of the package: run it from a checkout.
    """
    here = Path(__file__).resolve().parents[2]
    roots = [r for r in (here, Path.cwd()) if (r / "benchmarks" / "__main__.py").is_file()]
    if not roots:
        raise ValueError("there are no benchmarks here; run tta bench from a checkout of tta_ext")
    if str(roots[0]) not in sys.path:
        sys.path.insert(0, str(roots[0]))
    module = importlib.import_module("benchmarks.__main__")
    raise typer.Exit(int(module.main(context.args) or 0))

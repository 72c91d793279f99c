"""``tta bench``: the benchmarks, from an installed package or from a checkout.

They stand in ``benchmarks`` at the top of the repository and ship as ``tta_ext._benchmarks``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import typer

__all__ = ["bench"]

_NAME = "tta_ext._benchmarks"


def bench(context: typer.Context) -> None:
    """Time the ops against what they replace; arguments go to `python -m benchmarks`."""
    shipped = Path(__file__).resolve().parent.parent / "_benchmarks"
    checkout = shipped.parent.parent / "benchmarks" / "__init__.py"
    if _NAME not in sys.modules and not shipped.is_dir():
        spec = importlib.util.spec_from_file_location(
            _NAME, checkout, submodule_search_locations=[str(checkout.parent)]
        )
        if not checkout.exists() or spec is None or spec.loader is None:
            raise FileNotFoundError(
                f"the benchmarks are neither in {shipped} nor in {checkout.parent}; "
                "mend it with: pip install --force-reinstall --no-deps tta-ext"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        spec.loader.exec_module(module)
    raise typer.Exit(int(importlib.import_module(f"{_NAME}.__main__").main(context.args)))

"""``tta bench``: the benchmarks, from an installed package or from a checkout.

They stand in ``benchmarks`` at the top of the repository and ship as ``tta_ext._benchmarks``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from tta_ext.cli import config as config_file

__all__ = ["bench"]

_NAME = "tta_ext._benchmarks"


def bench(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML file of further arguments.")
    ] = None,
) -> None:
    """Time the ops against what they replace; arguments go to `python -m benchmarks`."""
    arguments = [*_arguments(config, context), *context.args]
    shipped = Path(__file__).resolve().parent.parent / "_benchmarks"
    checkout = shipped.parent.parent / "benchmarks" / "__init__.py"
    if _NAME not in sys.modules and not shipped.is_dir():
        spec = importlib.util.spec_from_file_location(
            _NAME, checkout, submodule_search_locations=[str(checkout.parent)]
        )
        if not checkout.exists() or spec is None or spec.loader is None:
            raise FileNotFoundError(
                f"the benchmarks are neither in {shipped} nor in {checkout.parent}; "
                "mend it with: pip install --force-reinstall --no-deps . in a checkout of tta_ext"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        spec.loader.exec_module(module)
    raise typer.Exit(int(importlib.import_module(f"{_NAME}.__main__").main(arguments)))


def _arguments(config: Path | None, context: typer.Context) -> list[str]:
    """Arguments from a file: `stems` stands for the benchmarks' names."""
    if config is None:
        return []
    found: list[str] = []
    for name, value in config_file.read(
        config, "bench", config_file.commands_beside(context)
    ).items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        if value is not None and value is not False:
            option = [] if name == "stems" else [f"--{name}"]
            found += [*option, *map(str, values)]
    return found

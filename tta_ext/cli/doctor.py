"""``tta doctor``: what was found, which backend serves each op, and why not another."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from tta_ext.cli.common import console

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what was found on this machine, which backend serves each op, and why not another."""
    from tta_ext.doctor import common_reasons, diagnose, library_state

    found = diagnose()
    if as_json:
        console.print_json(json.dumps(asdict(found), default=str))
        return
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.env.items():
        facts.add_row(name, str(value))
    facts.add_row("native CPU library", library_state(found.native))
    facts.add_row("CUDA library", library_state(found.cuda))
    facts.add_row("instruction set", found.cpu_isa or "none, the reference serves")
    facts.add_row("build cache", found.cache)
    console.print(facts)
    console.print()
    common = common_reasons(found.ops)
    for name, why in common.items():
        console.print(f"no op uses {name}: {why}")
    table = Table("op", "backend", "why not another", box=None, pad_edge=False)
    for op in found.ops:
        own = {name: why for name, why in op.why_not.items() if name not in common}
        table.add_row(op.name, op.backend, "; ".join(f"{k}: {v}" for k, v in own.items()))
    console.print(table)
    for line in found.advice:
        console.print(f"to mend: {line}", style="yellow")

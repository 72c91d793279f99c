"""``tta doctor``: what was found, which backend serves each op, and why not another."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from tta_ext.cli.config import Config

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Config = None,
) -> None:
    """Print what was found on this machine, which backend serves each op, and why not another."""
    from tta_ext.doctor import diagnose, render

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, default=str))
        return
    for line in render(found).splitlines():
        typer.secho(line, fg="yellow" if line.startswith("to mend: ") else None)

"""``tta merge``: one file of the files of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tta_ext.cli.common import errors
from tta_ext.cli.config import Config
from tta_ext.journal import Journal

__all__ = ["merge"]


def merge(
    shards: Annotated[list[Path], typer.Argument(help="Files of --shard runs.")],
    output: Annotated[Path, typer.Option(help="JSONL file of all, in the order of the input.")],
    config: Config = None,
) -> None:
    """Merge what --output or --journal of shards have, if nothing is missing.

    The merged file is what one run would have written, and one run goes on from it: `tta eval
    --journal`, for one, prints its table without decoding anything.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in shards:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        with Journal(path) as journal, journal.reading():
            for key, record in journal.records.items():
                _first(record), record["of"]
                if key not in found or "error" in found[key]:
                    found[key] = record
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in found.values():
        what = [record.get("run"), record.get("seed"), record.get("label")]
        groups.setdefault(json.dumps(what, sort_keys=True), []).append(record)
    for name, records in groups.items():
        _check(records, json.loads(name))
    with Journal(output) as whole:
        ordered = sorted(found, key=lambda key: _first(found[key]))
        whole.add({key: found[key] for key in ordered if whole.records.get(key) != found[key]})
    failed = [str(_first(record)) for record in found.values() if "error" in record]
    errors.print(f"{len(found)} records of {len(shards)} files: {output}")
    if failed:
        errors.print(f"{len(failed)} not answered: prompts {', '.join(failed)}", style="red")
        raise typer.Exit(1)


def _first(record: dict[str, Any]) -> int:
    """The place of a record's first item."""
    return int(record["index"] if "index" in record else record["start"])


def _check(records: list[dict[str, Any]], run: Any) -> None:
    """``ValueError`` unless records of one run have each of its items."""
    total = max(record["of"] for record in records)
    there = {
        _first(record) + i
        for record in records
        for i in range(len(record["texts"]) if "start" in record else 1)
    }
    missing = [str(place) for place in range(total) if place not in there]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {total} are missing, at {shown}, of the run {json.dumps(run)[:600]}"
        )

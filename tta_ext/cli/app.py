"""The commands, and errors as one sentence on stderr."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import typer

import tta_ext
from tta_ext._version import __version__
from tta_ext.cli import (
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    generate,
    merge,
    search,
    serve,
    sweep,
    trace,
    value,
    vllm_pair,
)
from tta_ext.cli.common import errors, sentence

__all__ = ["app", "run"]

app = typer.Typer(
    name="tta",
    help="Steer a frozen language model while it decodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(name: str, function: Callable[..., Any], **settings: Any) -> None:
    @functools.wraps(function)
    def registered(*arguments: Any, **options: Any) -> Any:
        tta_ext.register()  # no sooner, so that help does not wait for torch
        return function(*arguments, **options)

    app.command(name, **settings)(registered)


_command("demo", demo.demo)
_command("generate", generate.generate)
_command("search", search.search)
_command("eval", evaluate.evaluate)
_command("sweep", sweep.sweep)
_command("compare", compare.compare)
_command("value", value.value)
_command("merge", merge.merge)
_command("trace", trace.trace)
_command(
    "serve",
    serve.serve,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
_command("vllm-pair", vllm_pair.vllm_pair)
_command("doctor", doctor.doctor)
_command(
    "bench",
    bench.bench,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tta_ext {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Steer a frozen language model while it decodes."""


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. An error is one sentence, not a traceback."""
    try:
        app(args=None if argv is None else list(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if os.environ.get("TTA_EXT_TRACEBACK"):
            raise
        errors.print(f"tta: {sentence(error)}", style="red")
        return 1
    return 0

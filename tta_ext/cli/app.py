"""The commands, and errors as one sentence on stderr."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from tta_ext._version import __version__
from tta_ext.cli import (
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    generate,
    search,
    serve,
    trace,
    vllm_pair,
)
from tta_ext.cli.common import errors

__all__ = ["app", "run"]

app = typer.Typer(
    name="tta",
    help="Steer a frozen language model while it decodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("search")(search.search)
app.command("eval")(evaluate.evaluate)
app.command("sweep")(evaluate.sweep)
app.command("compare")(compare.compare)
app.command("trace")(trace.trace)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
app.command("vllm-pair")(vllm_pair.vllm_pair)
app.command("doctor")(doctor.doctor)
app.command(
    "bench",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(bench.bench)


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
    """Run a command line; the exit status. Bad input is one sentence, not a traceback."""
    try:
        app(args=None if argv is None else list(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("TTA_EXT_TRACEBACK"):
            raise
        errors.print(f"tta: {error}", style="red")
        return 1
    return 0

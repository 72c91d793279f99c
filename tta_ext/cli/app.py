"""The commands, and errors as one sentence on stderr."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import tta_ext
from tta_ext._version import __version__
from tta_ext.cli.common import at_home, errors, refuse_one_file_twice, sentence

__all__ = ["COMMANDS", "app", "run"]


class _Command(NamedTuple):
    """Where a command stands.

    Attributes:
        module, function: in :mod:`tta_ext.cli`.
        first: the first sentence of its documentation, so that a list of commands reads none.
        settings: of its click context.
    """

    module: str
    function: str
    first: str
    settings: dict[str, Any] = {}  # noqa: RUF012 never written to


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
COMMANDS = {
    "demo": _Command(
        "demo",
        "demo",
        "Accuracy of rules on the shipped pair, answers coloured by source, and where time went.",
    ),
    "generate": _Command(
        "generate",
        "generate",
        "Answer prompts with two models; `tta search` is for one model and a reward.",
    ),
    "search": _Command(
        "search", "search", "Answer prompts with one model, by a search for a high reward."
    ),
    "eval": _Command(
        "evaluate", "evaluate", "Accuracy of deferral rules, next to each model alone."
    ),
    "sweep": _Command(
        "sweep",
        "sweep",
        "Accuracy of one rule over a range of its parameter; otherwise as eval.",
    ),
    "compare": _Command(
        "compare",
        "compare",
        "Compare methods on the same prompts and reward, at equal samples or equal wall-clock.",
    ),
    "value": _Command(
        "value",
        "value",
        "Train a value function on answers that the model draws, for re_control and args.",
    ),
    "merge": _Command(
        "merge", "merge", "Merge what --output or --journal of shards have, if nothing is missing."
    ),
    "trace": _Command(
        "trace",
        "trace",
        "Answer one prompt and show, for each token, who wrote it and with which probabilities.",
    ),
    "serve": _Command(
        "serve",
        "serve",
        "Serve a base that defers to a proxy over the OpenAI interface.",
        _PASSED_ON,
    ),
    "vllm-pair": _Command(
        "vllm_pair",
        "vllm_pair",
        "Write the small folder that makes two models one for vLLM; weights are linked, not "
        "copied.",
    ),
    "doctor": _Command(
        "doctor",
        "doctor",
        "Print what was found on this machine, which backend serves each op, and why not another.",
    ),
    "bench": _Command(
        "bench",
        "bench",
        "Time the ops against what they replace; arguments go to `python -m benchmarks`.",
        _PASSED_ON | {"help_option_names": []},
    ),
}
_PLAIN: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}
_HELP = {"help_option_names": ["-h", "--help"]}


class _Options(TyperCommand):
    """A command whose files are looked at together, wherever their names come from."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            at_home(ctx.params)
            names = {one.name: max(one.opts, key=len) for one in self.params}
            refuse_one_file_twice({names[name]: value for name, value in ctx.params.items()})
        return rest


class _Commands(TyperGroup):
    """Makes a command when it is asked for: no other's module is read, and no other's options."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _made(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            for name in COMMANDS:  # among which typer looks for what was meant
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.first) for name, one in COMMANDS.items()])


def _made(name: str) -> Any:
    command = COMMANDS[name]
    function = getattr(import_module(f"tta_ext.cli.{command.module}"), command.function)

    @functools.wraps(function)
    def registered(*arguments: Any, **options: Any) -> Any:
        tta_ext.register()  # no sooner, so that help does not wait for torch
        return function(*arguments, **options)

    alone = typer.Typer(add_completion=False, **_PLAIN)
    alone.command(name, cls=_Options, context_settings=_HELP | command.settings)(registered)
    return get_command(alone)


app = typer.Typer(
    name="tta",
    cls=_Commands,
    help="Steer a frozen language model while it decodes.",
    no_args_is_help=True,
    context_settings=_HELP,
    **_PLAIN,
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

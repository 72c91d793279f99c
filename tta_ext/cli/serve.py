"""``tta serve``: an OpenAI server of an engine, with deferral in it."""

from __future__ import annotations

import os
from typing import Annotated

import typer

__all__ = ["serve"]


def serve(
    context: typer.Context,
    pair: Annotated[str, typer.Argument(help="Folder that tta vllm-pair wrote.")],
    engine: Annotated[str, typer.Option(help="What serves: vllm.")] = "vllm",
) -> None:
    """Become vLLM's OpenAI server of a pair; options that are not ours are vLLM's.

    A request says in "vllm_xargs" what it wants: tta_rule, tta_param, tta_seed, tta_sequence,
    tta_rule_temperature, tta_critical; without them the base alone answers.
    """
    from tta_ext.engines.vllm.pair import serve_command

    if engine != "vllm":
        raise ValueError(f"--engine is {engine!r}, expected vllm")
    command = serve_command(pair, context.args)
    os.execvp(command[0], command)

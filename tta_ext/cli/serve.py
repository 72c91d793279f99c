"""``tta serve``: an OpenAI server with deferral in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tta_ext.cli import common
from tta_ext.cli.config import Config

if TYPE_CHECKING:
    from tta_ext.evaluation import Setting

__all__ = ["serve"]

VLLM = "vllm"
# What only one of the two uses.
OURS = {"base", "proxy", "rule", "param", "critical", "rule_temperature", "dtype", "device"}


def serve(
    context: typer.Context,
    pair: Annotated[
        str | None, typer.Argument(help="For vllm: the folder that tta vllm-pair wrote.")
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What serves.")
    ] = "transformers",
    base: common.Base = None,
    proxy: common.Proxy = None,
    rule: common.Rule = "threshold",
    param: common.Param = None,
    critical: common.Critical = "exclude",
    rule_temperature: common.RuleTemperature = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "localhost",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    config: Config = None,
) -> None:
    """Serve a base that defers to a proxy over the OpenAI interface.

    transformers: one answer at a time under one rule, for demonstrations and evaluation tools.
    vllm: becomes vLLM's server of a pair; options that are not ours are vLLM's. There a request
    says in "vllm_xargs" what it wants: tta_rule, tta_param, tta_critical, tta_rule_temperature,
    tta_seed, tta_sequence; without them the base alone answers.
    """
    if engine == VLLM:
        from tta_ext.engines.vllm.pair import serve_command

        common.refuse_unused(context, "--engine vllm", OURS)
        if pair is None:
            raise ValueError("--engine vllm needs the folder that tta vllm-pair wrote")
        command = serve_command(pair, ["--host", host, "--port", str(port), *context.args])
        os.execvp(command[0], command)
    else:
        if pair is not None or context.args:
            unused = " ".join(([pair] if pair else []) + context.args)
            raise ValueError(f"--engine transformers does not use {unused}")
        setting = common.chosen_setting(context, rule, param, critical)
        _serve(context.params, setting)


def _serve(options: dict[str, Any], setting: Setting) -> None:
    """transformers' server, until interrupted."""
    from tta_ext import serving
    from tta_ext.demo.pair import ASSETS

    base, proxy = options["base"], options["proxy"]
    if (base is None) != (proxy is None):
        raise ValueError("--base and --proxy belong together (without both, the demo's pair)")
    serving.serve(
        base or str(ASSETS / "base"),
        proxy or str(ASSETS / "proxy"),
        device=options["device"] or "auto",
        **{name: options[name] for name in ("host", "port", "dtype", "rule_temperature")},
        **setting.facts(),
    )

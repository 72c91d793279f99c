"""``tta trace``: what happened at each token of one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.common import console
from tta_ext.cli.config import Config
from tta_ext.cli.prompts import read_prompts
from tta_ext.journal import json_line, run_facts

__all__ = ["trace"]


def trace(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    base: common.Base = None,
    proxy: common.Proxy = None,
    rule: common.Rule = "threshold",
    param: common.Param = None,
    critical: common.Critical = "exclude",
    temperature: common.Temperature = 1.0,
    rule_temperature: common.RuleTemperature = None,
    greedy: common.Greedy = False,
    seed: common.Seed = 0,
    max_new_tokens: common.MaxNewTokens = 64,
    chat: common.Chat = False,
    output: Annotated[Path | None, typer.Option(help="JSONL file, a line for each token.")] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    attn_implementation: common.Attention = None,
    quantization_config: common.Quantization = None,
    revision: common.Revision = None,
    proxy_revision: common.ProxyRevision = None,
    threads: common.Threads = None,
    config: Config = None,
) -> None:
    """Answer one prompt and show, for each token, who wrote it and with which probabilities."""
    setting = common.chosen_setting(context, rule, param, critical)
    common.check_output(output)
    models = common.load_models(
        base, proxy, proxy_revision=proxy_revision, **common.loading_options(context)
    )
    kad = models.decoder(setting, temperature=temperature, rule_temperature=rule_temperature)
    result = kad.generate(
        [one.prompt for one in read_prompts([prompt], None, chat)],
        do_sample=not greedy,
        seed=seed,
        max_new_tokens=max_new_tokens,
        trace=True,
    )
    assert result.trace is not None
    decode = kad.tokenizer.decode
    if output is not None:
        run = run_facts(
            models=models.facts(), **setting.facts(), temperature=temperature,
            rule_temperature=rule_temperature, greedy=greedy, seed=result.seed, prompt=prompt,
        )  # fmt: skip
        lines = [
            json_line({"text": decode([t.token]), **t.as_dict()} | ({} if i else {"run": run}))
            for i, t in enumerate(result.trace[0])
        ]
        output.write_text("".join(lines), encoding="utf-8", newline="\n")
    common.echo_coloured(result.source_spans(0, kad.tokenizer))
    table = Table("token", "source", "p", "q", "deferred mass", "critical", box=None)
    for t in result.trace[0]:
        table.add_row(
            repr(decode([t.token])),
            t.source,
            f"{t.p:.4f}",
            "" if t.q is None else f"{t.q:.4f}",
            f"{t.deferred_mass:.4f}",
            "" if t.critical is None else repr(decode([t.critical])),
            style=common.PROXY_STYLE if t.source == "proxy" else None,
        )
    common.show_table(table)
    stats = result.stats
    console.print(
        f"{stats.tokens} tokens, {stats.deferred_tokens} from the proxy; seed {result.seed}"
    )

"""``tta trace``: what happened at each token of one answer, or in each iteration of one search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.common import console, errors
from tta_ext.cli.config import Config
from tta_ext.cli.prompts import read_prompts
from tta_ext.cli.search import (
    SMOLLM2,
    Model,
    Settings,
    chosen_reward,
    given_settings,
    load_model_and_tokenizer,
    reward_facts,
)
from tta_ext.files import write_file
from tta_ext.journal import json_line, model_facts, run_facts

__all__ = ["trace"]

# Options of a deferral, and of a search, that the other does not use.
DEFERRAL = {"base", "proxy", "rule", "param", "critical", "rule_temperature", "proxy_revision"}
SEARCH = {"method", "model", "settings"}


def trace(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    base: common.Base = None,
    proxy: common.Proxy = None,
    rule: common.Rule = "threshold",
    param: common.Param = None,
    critical: common.Critical = "exclude",
    reward: Annotated[
        str | None, typer.Option(help="Trace a search for this reward (see tta search) instead.")
    ] = None,
    method: Annotated[str, typer.Option(help="Method of the search.")] = "aisp",
    model: Model = SMOLLM2,
    settings: Settings = None,
    temperature: common.Temperature = 1.0,
    rule_temperature: common.RuleTemperature = None,
    greedy: common.Greedy = False,
    seed: common.Seed = 0,
    max_new_tokens: common.MaxNewTokens = 64,
    chat: common.Chat = False,
    html: Annotated[
        Path | None, typer.Option(help="HTML page, complete in itself, for the same account.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSONL file, a line for each token (iteration).")
    ] = None,
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
    """Answer one prompt and show, for each token, who wrote it and with which probabilities.

    With --reward the prompt is answered by a search, whose iterations are shown.
    """
    from tta_ext import pages

    if reward is None:
        common.refuse_unused(context, "a trace without --reward", SEARCH)
    else:
        common.refuse_unused(context, "--reward", DEFERRAL)
    common.check_output(output)
    common.check_output(html, pages.MARK)
    asked = [one.prompt for one in read_prompts([prompt], None, chat)]
    lines, page = (_deferral if reward is None else _search)(context, asked)
    if output is not None:
        write_file(output, "".join(map(json_line, lines)))
    if html is not None:
        write_file(html, page())
        errors.print(f"written: {html}")


# The lines of a JSONL file, and what makes a page.
Account = tuple[list[dict[str, Any]], Callable[[], str]]


def _deferral(context: typer.Context, asked: list[Any]) -> Account:
    """Answer by deferral, and print the account."""
    from tta_ext.decoding.runtime.prompts import text_of
    from tta_ext.pages import deferral_page

    options = context.params
    setting = common.chosen_setting(context, options["rule"], options["param"], options["critical"])
    named = {name: options[name] for name in ("base", "proxy", "proxy_revision")}
    models = common.load_models(**named, **common.loading_options(context))
    heat = {name: options[name] for name in ("temperature", "rule_temperature")}
    kad = models.decoder(setting, **heat)
    result = kad.generate(
        asked, do_sample=not options["greedy"], seed=options["seed"],
        max_new_tokens=options["max_new_tokens"], trace=True,
    )  # fmt: skip
    assert result.trace is not None
    decode = partial(text_of, kad.tokenizer, special=True)
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
    run = run_facts(
        models=models.facts(), **setting.facts(), **heat, greedy=options["greedy"],
        seed=result.seed, prompt=options["prompt"],
    )  # fmt: skip
    lines = [
        ({} if i else {"run": run}) | {"text": decode([t.token]), **t.as_dict()}
        for i, t in enumerate(result.trace[0])
    ]
    facts = {"rule": setting.label, **{k: v for k, v in heat.items() if v is not None}}
    return lines, lambda: deferral_page(result, kad.tokenizer, facts=facts)


def _search(context: typer.Context, asked: list[Any]) -> Account:
    """Answer by a search, and print its iterations."""
    from tta_ext.decoding.search.compare import method_class, typed
    from tta_ext.decoding.search.settings import settings_facts
    from tta_ext.pages import search_page

    options = context.params
    kind = method_class(options["method"])
    chosen: dict[str, Any] = {k: options[k] for k in ("temperature", "max_new_tokens")}
    chosen |= {"decoding": "greedy"} if options["greedy"] else {}
    chosen = typed(kind, chosen | given_settings(context))
    scorer = chosen_reward(options["reward"])
    loaded, tokenizer = load_model_and_tokenizer(
        options["model"], **common.loading_options(context)
    )
    searcher = kind(loaded, scorer, tokenizer, **chosen)
    result = searcher.generate(asked, seed=options["seed"])
    common.echo(result.text)
    columns = {"mean": "mean", "best": "best", "ESS": "ess", "|u|": "norm", "KL, nats": "kl"}
    table = common.table("iteration", *columns)
    for one in result.curves[0]:
        cells = [getattr(one, name) for name in columns.values()]
        table.add_row(str(one.iteration), *("-" if x is None else f"{x:.4g}" for x in cells))
    common.show_table(table)
    run = run_facts(
        method=kind.name, **settings_facts(searcher.settings),
        models={"model": model_facts(loaded)}, reward=reward_facts(options["reward"]),
        seed=result.seed, prompt=options["prompt"],
    )  # fmt: skip
    lines = [({} if i else {"run": run}) | one.as_dict() for i, one in enumerate(result.curves[0])]
    facts = {"reward": options["reward"], "model": options["model"]}
    return lines, lambda: search_page(result, facts=facts)

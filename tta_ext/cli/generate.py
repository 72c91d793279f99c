"""``tta generate``: two models answer prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_ext.cli import common
from tta_ext.journal import Journal

if TYPE_CHECKING:
    from tta_ext.decoding import Generation, KnapsackDeferral

__all__ = ["generate"]

# What --method may be: a rule decides token by token, or experts tilt the base.
KAD, IMPLICIT = "kad", "implicit-reward"


def generate(
    context: typer.Context,
    prompts: common.Prompts = None,
    method: Annotated[str, typer.Option(help=f"How to decode: {KAD} or {IMPLICIT}.")] = KAD,
    base: common.Base = None,
    proxy: common.Proxy = None,
    anti: common.Anti = None,
    rule: common.Rule = "threshold",
    param: common.Param = None,
    critical: common.Critical = "exclude",
    temperature: common.Temperature = 1.0,
    rule_temperature: common.RuleTemperature = None,
    greedy: common.Greedy = False,
    seed: common.Seed = None,
    max_new_tokens: common.MaxNewTokens = 128,
    samples: Annotated[int, typer.Option(min=1, help="Answers for each prompt.")] = 1,
    speculative: Annotated[
        str | None,
        typer.Option(help="Tokens that are drafted for the base to judge at once, or auto."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Who drafts: proxy (default), base or lookup.")
    ] = None,
    stop: common.Stop = None,
    chat: common.Chat = False,
    system: common.System = None,
    source: common.Source = None,
    output: common.Output = None,
    jsonl: common.Jsonl = False,
    colour: Annotated[
        bool, typer.Option("--colour", "--color", help="Colour the text by its source.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    batch_size: common.BatchSize = 16,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Answer prompts with two models; `tta search` is for one model and a reward.

    Prompts are arguments, lines of --input or stdin, or JSONL records with "prompt" or "messages".
    Without --base and --proxy the small pair that ships with the package answers.
    """
    from tta_ext.evaluation import IMPLICIT_REWARD

    _check_method(method)
    if method == IMPLICIT:
        common.refuse_unused(context, f"--method {IMPLICIT}", {"rule"})
        rule = IMPLICIT_REWARD
    setting = common.chosen_setting(context, rule, param, critical)
    for name, chosen, unused in (
        ("--stream", stream, {"output", "jsonl", "colour", "batch_size"}),
        ("--output", output is not None, {"jsonl", "colour"}),
        ("--jsonl", jsonl, {"colour"}),
    ):
        if chosen:
            common.refuse_unused(context, name, unused)
    asked = common.read_prompts(prompts, source, chat, system)
    journal = Journal(output)
    seed = common.chosen_seed(seed, journal)
    implicit = setting.rule == IMPLICIT_REWARD
    models = common.load_models(base, proxy, anti, implicit=implicit, dtype=dtype, device=device)
    pair_options: dict[str, Any] = {
        "temperature": temperature,
        "rule_temperature": rule_temperature,
        "speculative": _draft_length(speculative),
        "draft": draft,
    }
    kad = models.decoder(setting, **pair_options)
    options: dict[str, Any] = {
        "do_sample": not greedy,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": samples,
        "stop_strings": stop or None,
    }
    if stream:
        _stream(kad, asked, options)
        return
    facts = {
        "method": "generate",
        "models": models.facts() if output is not None else None,
        **asdict(setting),
        **pair_options,
        **options,
    }
    common.answer(
        asked,
        facts,
        journal=journal,
        jsonl=jsonl,
        at_once=max(1, batch_size // samples),
        decode=lambda places: kad.generate(
            [asked[i] for i in places],
            sequence=[i * samples + j for i in places for j in range(samples)],
            **options,
        ),
        records=lambda result: _records(result, samples),
        show=lambda result: _print(kad, result, colour),
    )


def _check_method(method: str) -> None:
    from tta_ext.decoding.search.compare import METHODS

    if method.replace("-", "_") in METHODS:
        raise ValueError(
            f"{method} searches by a reward with one model: tta search --method {method}"
        )
    if method not in (KAD, IMPLICIT):
        raise ValueError(f"--method is {method!r}, expected {KAD} or {IMPLICIT}")


def _draft_length(value: str | None) -> int | str | None:
    """The option --speculative as the library takes it, which also checks it."""
    if value is not None and value.lstrip("-").isdigit():
        return int(value)
    return value


def _stream(kad: KnapsackDeferral, prompts: list[Any], options: dict[str, Any]) -> None:
    # One prompt at a time, so that texts do not mix.
    samples = options["num_return_sequences"]
    for i, prompt in enumerate(prompts):
        texts = [""] * samples
        sequence = range(i * samples, (i + 1) * samples)
        for event in kad.stream([prompt], sequence=sequence, **options):
            if samples == 1:
                common.echo(event.text or "", common.source_style(event.deferred), end="")
            texts[event.row] += event.text or ""
        if samples > 1:
            common.echo("\n".join(texts))
        common.echo("")


def _records(result: Generation, samples: int) -> list[dict[str, Any]]:
    return [
        {
            "texts": (result.texts or [])[at : at + samples],
            "finish": result.finish[at : at + samples],
            "tokens": result.tokens[at : at + samples],
            "deferred": [[int(flag) for flag in row] for row in result.deferred[at : at + samples]],
            "seed": result.seed,
        }
        for at in range(0, len(result), samples)
    ]


def _print(kad: KnapsackDeferral, result: Generation, colour: bool) -> None:
    for row, text in enumerate(result.texts or ()):
        if colour:
            common.echo_coloured(result.source_spans(row, kad.tokenizer))
        else:
            common.echo(text)

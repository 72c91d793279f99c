"""``tta generate``: prompts in, aligned text out."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_ext.cli import aisp, common
from tta_ext.cli.common import console, errors

if TYPE_CHECKING:
    from tta_ext.decoding import Generation, KnapsackDeferral

__all__ = ["generate"]


class Method(str, Enum):
    """Ways of decoding."""

    kad = "kad"
    implicit_reward = "implicit-reward"
    aisp = "aisp"
    best_of_n = "best-of-n"
    args = "args"
    chunk_beam = "chunk-beam"


# These have two models; the others one model and a reward.
_PAIRS = (Method.kad, Method.implicit_reward)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; default: stdin.")] = None,
    method: Annotated[Method, typer.Option(help="How to decode.")] = Method.kad,
    base: common.Base = None,
    proxy: common.Proxy = None,
    anti: Annotated[
        str | None, typer.Option(help="The proxy before alignment, for implicit-reward.")
    ] = None,
    rule: common.Rule = "threshold",
    param: common.Param = None,
    critical: common.Critical = "exclude",
    temperature: common.Temperature = 1.0,
    rule_temperature: common.RuleTemperature = None,
    greedy: common.Greedy = False,
    seed: common.Seed = None,
    max_new_tokens: common.MaxNewTokens = 128,
    samples: Annotated[int, typer.Option(help="Answers for each prompt.")] = 1,
    speculative: Annotated[
        str | None,
        typer.Option(help="Tokens that the proxy drafts for the base to judge at once, or auto."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends an answer.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap text prompts in the models' chat templates.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message for --chat.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="File of prompts, one a line, or JSONL; - is stdin."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSONL file to append answers to; a run cut short goes on from there."),
    ] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print JSONL instead of text.")] = False,
    colour: Annotated[
        bool, typer.Option("--colour", "--color", help="Colour the text by its source.")
    ] = False,
    model: aisp.Model = aisp.SMOLLM2,
    reward: aisp.RewardName = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations of aisp.")] = None,
    n: Annotated[
        int | None, typer.Option("--n", help="Rollouts an iteration (aisp) or in all (best-of-n).")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise of aisp.")] = None,
    lam: Annotated[float | None, typer.Option(help="Temperature of aisp's reward.")] = None,
    settings: aisp.Settings = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    batch_size: common.BatchSize = 16,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Answer prompts: with two models, or with one model and a reward.

    Prompts are arguments, lines of --input or stdin, or JSONL records with "prompt" or "messages".
    Methods kad and implicit-reward: without --base and --proxy the small pair that ships with the
    package answers. The other methods take --model and --reward.
    """
    common.set_threads(threads)
    if method is Method.implicit_reward:
        rule = "implicit_reward"
    asked = common.read_prompts(prompts, source)
    if chat or system is not None:
        asked = [as_conversation(prompt, system) for prompt in asked]
    if seed is None:
        import torch

        seed = int(torch.randint(2**31, ()))
    if method not in _PAIRS:
        if stream or samples != 1 or speculative:
            raise ValueError(
                f"--method {method.value} takes neither --stream nor --samples nor --speculative"
            )
        aisp.search(
            asked,
            method=method.value,
            model=model,
            reward=reward,
            settings=settings or [],
            options={
                "n": n,
                "iterations": iterations,
                "sigma": sigma,
                "lam": lam,
                "temperature": temperature,
                "max_new_tokens": max_new_tokens,
                "stop_strings": stop or None,
                "decoding": "greedy" if greedy else None,
            },
            seed=seed,
            output=output,
            jsonl=jsonl,
            rows=batch_size,
            dtype=dtype,
            device=device,
        )
        return
    kad = common.load_pair(
        base,
        proxy,
        anti,
        rule=rule,
        param=param,
        dtype=dtype,
        device=device,
        critical=critical,
        temperature=temperature,
        rule_temperature=rule_temperature,
        speculative=_draft_length(speculative),
    )
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
    _batches(kad, asked, options, samples, output, jsonl, colour, batch_size)


def _draft_length(value: str | None) -> int | str | None:
    """The option --speculative as the library takes it, which also checks it."""
    if value is not None and value.lstrip("-").isdigit():
        return int(value)
    return value


def as_conversation(prompt: Any, system: str | None) -> Any:
    """A text prompt as a conversation; conversations stay."""
    if not isinstance(prompt, str):
        return prompt
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": prompt}]


def _stream(kad: KnapsackDeferral, prompts: list[Any], options: dict[str, Any]) -> None:
    # One prompt at a time, so that texts do not mix.
    for i, prompt in enumerate(prompts):
        first = i * options["num_return_sequences"]
        sequence = range(first, first + options["num_return_sequences"])
        texts: dict[int, str] = {}
        for event in kad.stream([prompt], sequence=sequence, **options):
            if len(sequence) == 1:
                style = common.PROXY_STYLE if event.deferred else common.BASE_STYLE
                console.print(
                    event.text, end="", style=style, markup=False, highlight=False, soft_wrap=True
                )
            texts[event.row] = texts.get(event.row, "") + (event.text or "")
        if len(sequence) > 1:
            for row in sorted(texts):
                console.print(texts[row], markup=False, highlight=False, soft_wrap=True)
        console.print()


def _batches(
    kad: KnapsackDeferral,
    prompts: list[Any],
    options: dict[str, Any],
    samples: int,
    output: Path | None,
    jsonl: bool,
    colour: bool,
    batch_size: int,
) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, expected at least 1")
    file = common.JsonLines(output)
    done = {record["key"] for record in file.records if "key" in record}
    keys = [_key(kad, prompt, i, options) for i, prompt in enumerate(prompts)]
    todo = [i for i, key in enumerate(keys) if key not in done]
    per_batch = max(1, batch_size // samples)
    with common.bar() as bar:
        task = bar.add_task("answers", total=len(prompts), completed=len(prompts) - len(todo))
        for start in range(0, len(todo), per_batch):
            chosen = todo[start : start + per_batch]
            # Ids by place in the input: a run that was cut short draws what it would have drawn.
            sequence = [i * samples + j for i in chosen for j in range(samples)]
            result = kad.generate([prompts[i] for i in chosen], sequence=sequence, **options)
            records = _records(result, [(i, keys[i], prompts[i]) for i in chosen], samples)
            if output is not None or jsonl:
                file.write(records)
            else:
                _print(kad, result, colour)
            bar.advance(task, len(chosen))
    if output is not None:
        errors.print(f"{len(todo)} answered, {len(prompts) - len(todo)} were there: {output}")


def _key(kad: KnapsackDeferral, prompt: Any, place: int, options: dict[str, Any]) -> str:
    """What must be equal for an answer in the output file to count as this prompt's."""
    names = [getattr(m.config, "_name_or_path", "") for m in (kad.base, *kad.proxies, *kad.anti)]
    settings = [prompt, place, options, kad.rule, names]
    if kad.speculative is not None:
        settings.append(kad.speculative)
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:16]


def _records(
    result: Generation, prompts: list[tuple[int, str, Any]], samples: int
) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "index": place,
            "prompt": prompt,
            "texts": (result.texts or [])[at * samples : (at + 1) * samples],
            "finish": result.finish[at * samples : (at + 1) * samples],
            "tokens": result.tokens[at * samples : (at + 1) * samples],
            "deferred": [
                [int(flag) for flag in flags]
                for flags in result.deferred[at * samples : (at + 1) * samples]
            ],
            "seed": result.seed,
        }
        for at, (place, key, prompt) in enumerate(prompts)
    ]


def _print(kad: KnapsackDeferral, result: Generation, colour: bool) -> None:
    for row, text in enumerate(result.texts or ()):
        if colour:
            console.print(common.coloured(result.source_spans(row, kad.tokenizer)), soft_wrap=True)
        else:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

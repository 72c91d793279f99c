"""Answers of ``tta generate`` and ``tta search``: as text, as JSONL, into a file that resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import typer

from tta_ext.cli.common import echo, errors, sentence
from tta_ext.cli.progress import progress
from tta_ext.cli.prompts import Asked
from tta_ext.jobs import Crew
from tta_ext.journal import Journal, Shard, json_line, resume_key, run_facts

__all__ = ["answer", "chosen_seed", "heading", "tell"]

# Equal errors that are said one by one.
TOLD = 3


def chosen_seed(seed: int | None, journal: Journal) -> int:
    """The seed asked for; else that of the answers in the file, so that they stand; else any."""
    if seed is None:
        seed = next((r["seed"] for r in reversed(journal.records.values()) if "seed" in r), None)
    if seed is None:
        import torch

        seed = int(torch.randint(2**31, ()))
        errors.print(f"seed {seed}")
    return seed


def heading(prompts: Sequence[Asked], place: int, samples: int = 1) -> None:
    """Say which answer follows, where there are several: they may hold any line."""
    if len(prompts) * samples > 1:
        prompt = prompts[place].prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            prompt = prompt[-1].get("content")
        words = " ".join(str(prompt).split())
        echo(f"[{place}] {words if len(words) <= 60 else words[:57] + '...'}", dim=True)


def tell(name: str, error: Exception, told: Counter[str]) -> str:
    """Say on stderr why a prompt was not answered, unless the same was said often; the sentence."""
    said = sentence(error).replace("prompt 0", "the prompt")  # it was asked about alone
    told[said] += 1
    if told[said] <= TOLD:
        errors.print(f"tta: {name}: {said}", style="red")
    return said


def answer(
    prompts: Sequence[Asked],
    facts: dict[str, Any],
    *,
    journal: Journal,
    jsonl: bool,
    shard: Shard,
    at_once: int,
    crew: Crew,
    records: Callable[[Any], list[dict[str, Any]]],
    show: Callable[[Any, list[int]], None],
) -> None:
    """Answer prompts in batches: into a file that resumes, as JSONL, or as text.

    ``crew`` answers places of the list, ``records`` makes a record of each, and ``show``
    prints them. ``facts`` are what decides the answers besides prompt and place
    (:func:`tta_ext.journal.resume_key`), the seed among them. Random streams are named by the place
    in the input, so a run that was cut short draws what it would have drawn.

    A prompt that cannot be answered has a record with its error and stops no other; the next run
    tries it again.

    Raises:
        typer.Exit: some prompts were not answered; the status is 1.
    """
    part = shard.of(range(len(prompts)))
    keys = {i: resume_key(**facts, prompt=prompts[i].prompt, place=i) for i in part}
    known = {i: journal.records.get(key) for i, key in keys.items()}
    todo = [i for i, record in known.items() if record is None or "error" in record]
    there = len(part) - len(todo)
    text = journal.path is None and not jsonl
    failed: list[str] = []
    told: Counter[str] = Counter()
    run = run_facts(**{name: fact for name, fact in facts.items() if name != "seed"})

    def keep(places: list[int], made: list[dict[str, Any]]) -> None:
        items = {}
        for place, record in zip(places, made, strict=True):
            one = prompts[place]
            line = {} if one.line is None else {"line": one.line}
            head = {"index": place, "of": len(prompts), **line, "prompt": one.prompt}
            items[keys[place]] = {**one.fields, **head, **record, "seed": facts["seed"], "run": run}
        if journal.path is None:
            echo("".join(map(json_line, items.values())), end="")
            return
        # An error that the file has already is not written again.
        new = {
            key: item
            for key, item in items.items()
            if journal.records.get(key, {}).get("error", 0) != item.get("error", 1)
        }
        journal.add(new)

    with progress("answers", len(part), there, text) as advance:
        jobs = ((None, todo[at : at + at_once]) for at in range(0, len(todo), at_once))
        for _, places, result in crew.map(jobs):
            if isinstance(result, Exception):
                failed.append(prompts[places[0]].name(places[0]))
                said = tell(failed[-1], result, told)
                if not text:
                    keep(places, [{"error": said}])
            elif text:
                show(result, places)
            else:
                keep(places, records(result))
            advance(len(places), tokens_of(result))
    if journal.path is not None:
        errors.print(f"{len(todo) - len(failed)} answered, {there} were there: {journal.path}")
    if failed:
        errors.print(f"{len(failed)} of {len(part)} not answered: {', '.join(failed)}", style="red")
        raise typer.Exit(1)


def tokens_of(result: Any) -> int:
    """Tokens that a result took; 1 where nothing says."""
    for name in ("stats", "timing"):
        if hasattr(result, name):
            return int(getattr(result, name).tokens)
    return 1

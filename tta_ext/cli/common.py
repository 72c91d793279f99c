"""What the commands share: consoles, options, models, prompts, answers that resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tta_ext.journal import Journal, json_line, parse_jsonl, resume_key

if TYPE_CHECKING:
    from tta_ext.evaluation import Models, Setting

__all__ = ["console", "errors"]

# What is printed is text of models, paths and tokens, never markup.
console = Console(markup=False, highlight=False, emoji=False)
errors = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

PROXY_STYLE = "magenta"
BASE_STYLE = "cyan"


def _set_threads(threads: int | None) -> int | None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts; default: stdin.")]
Source = Annotated[
    Path | None, typer.Option("--input", help="File of prompts, one a line, or JSONL; - is stdin.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Wrap text prompts in the models' chat templates.")
]
System = Annotated[str | None, typer.Option(help="System message; implies --chat.")]
Output = Annotated[
    Path | None,
    typer.Option(help="JSONL file to append answers to; a run cut short goes on from there."),
]
Jsonl = Annotated[bool, typer.Option("--jsonl", help="Print JSONL instead of text.")]
Stop = Annotated[list[str] | None, typer.Option(help="String that ends an answer.")]
Base = Annotated[
    str | None,
    typer.Option(help="Base model: folder, .gguf file or hub name. Default: the demo's."),
]
Proxy = Annotated[str | None, typer.Option(help="Proxy model, likewise.")]
Anti = Annotated[
    str | None, typer.Option(help="The proxy before alignment, for implicit reward, likewise.")
]
Rule = Annotated[str, typer.Option(help="Deferral rule, or implicit_reward.")]
Param = Annotated[
    float | None, typer.Option(help="The rule's parameter (beta for implicit_reward).")
]
Critical = Annotated[
    Literal["exclude", "include", "split"], typer.Option(help="Knapsack's critical item.")
]
Temperature = Annotated[float, typer.Option(help="Temperature of both models.")]
RuleTemperature = Annotated[
    float | None, typer.Option(help="Temperature at which the rule looks at the models.")
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the most probable token.")]
Seed = Annotated[int | None, typer.Option(help="Seed; the same seed gives the same answers.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens after which an answer ends.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answers decoded together.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the weights.")
]
Device = Annotated[str | None, typer.Option(help="Device of the models, such as cuda.")]
Threads = Annotated[
    int | None, typer.Option(min=1, callback=_set_threads, help="Threads of torch.")
]

DEFAULT_PARAM = {
    "knapsack": 0.9,
    "threshold": 0.4,
    "confidence_bet": 0.2,
    "nudging": 0.4,
    "relative": 0.2,
    "proxy_below": -0.3,
    "proxy_above": 0.2,
    "implicit_reward": 1.0,
}


def refuse_unused(context: typer.Context, choice: str, unused: Collection[str]) -> None:
    """``ValueError`` if the command line has a parameter that what was chosen does not use."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in unused and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{choice} does not use {parameter.opts[0]}")


def chosen_setting(
    context: typer.Context, rule: str, param: float | None, critical: str
) -> Setting:
    """The rule that a command's options name; ``ValueError`` for one that it does not use."""
    from tta_ext import rules
    from tta_ext.evaluation import IMPLICIT_REWARD, Setting

    unused = {
        IMPLICIT_REWARD: {"critical", "rule_temperature"},
        "knapsack": {"anti"},
        "argmax": {"anti", "critical", "param"},
    }
    name = rule if rule == IMPLICIT_REWARD else rules.rule_name(rule)
    refuse_unused(context, f"rule {name}", unused.get(name, {"anti", "critical"}))
    return Setting(name, DEFAULT_PARAM.get(name) if param is None else param, critical)


def check_writable(path: Path | None) -> None:
    """An ``OSError`` before the work if a file cannot be written after it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()


def write_report(path: Path | None, value: Any) -> None:
    """Write a JSON file if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        errors.print(f"written: {path}")


def quiet_transformers() -> None:
    """No progress bars and advice from transformers between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_models(
    base: str | None,
    proxy: str | None,
    anti: str | None = None,
    *,
    implicit: bool = False,
    dtype: str = "auto",
    device: str | None = None,
) -> Models:
    """The models named on the command line; none: the demo's, with an anti if ``implicit``."""
    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer
    from tta_ext.evaluation import Models

    if base is None and proxy is None and anti is None:
        from tta_ext.demo.pair import ASSETS

        base, proxy = str(ASSETS / "base"), str(ASSETS / "proxy")
        anti = str(ASSETS / "proxy_init") if implicit else None
    if base is None or proxy is None:
        raise ValueError(
            "--base and --proxy belong together (without both, the demo's pair is used)"
        )
    quiet_transformers()
    get = partial(load_model, dtype=dtype, device=device)
    with errors.status("loading models"):
        return Models(
            get(base), get(proxy), load_tokenizer(base), load_tokenizer(proxy), anti and get(anti)
        )


def read_prompts(
    arguments: Iterable[str] | None,
    source: Path | None,
    chat: bool = False,
    system: str | None = None,
) -> list[Any]:
    """Prompts from arguments, else from a file, else from stdin.

    A file whose first line starts with ``{`` or ``[`` is JSONL: strings do not need that form; an
    object has ``prompt`` (text) or ``messages`` (a conversation), a list is a conversation. Any
    other file has a prompt on each line that is not empty. With ``chat`` or a system message, texts
    become conversations.
    """
    prompts = list(arguments or ())
    if prompts and source is not None:
        raise ValueError("prompts are given both as arguments and by --input")
    if not prompts:
        prompts = _parse_prompts(source)
    if not chat and system is None:
        return prompts
    start = [] if system is None else [{"role": "system", "content": system}]
    return [
        [*start, {"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _parse_prompts(source: Path | None) -> list[Any]:
    from tta_ext.evaluation import record_prompt

    if source is not None and str(source) != "-":
        # Not read_text, which would end lines at carriage returns too.
        text = source.read_bytes().decode()
    elif source is None and sys.stdin.isatty():
        raise ValueError("there are no prompts: pass them as arguments, by --input or on stdin")
    else:
        text = sys.stdin.read()
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise ValueError("the input has no prompts")
    if text.lstrip()[0] not in "{[":
        return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    return [record_prompt(record) for record in parse_jsonl(text)]


def echo(text: str, style: str | None = None, end: str = "\n") -> None:
    """Print a model's text as it is, coloured where stdout is a terminal that wants colours."""
    if style is not None and console.is_terminal and not console.no_color:
        text = typer.style(text, fg=style)
    print(text, end=end, flush=True)


def source_style(from_proxy: bool) -> str:
    """The colour of a token."""
    return PROXY_STYLE if from_proxy else BASE_STYLE


def echo_coloured(spans: Iterable[tuple[str, bool]]) -> None:
    """Print text in the colours of its sources."""
    for piece, from_proxy in spans:
        echo(piece, source_style(from_proxy), end="")
    echo("")


@contextmanager
def progress(unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, so that stdout keeps only results; yields what counts further units."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True) as bar:
        yield partial(bar.advance, bar.add_task(unit, total=total, completed=done))


def table(name: str, *numbers: str) -> Table:
    """A table whose first column is text and the others right-aligned."""
    made = Table(box=None, pad_edge=False)
    made.add_column(name, overflow="fold")
    for number in numbers:
        made.add_column(number, justify="right", no_wrap=True)
    return made


def chosen_seed(seed: int | None, journal: Journal) -> int:
    """The seed asked for; else that of the answers in the file, so that they stand; else any."""
    if seed is None:
        seed = next((r["seed"] for r in reversed(journal.records.values()) if "seed" in r), None)
    if seed is None:
        import torch

        seed = int(torch.randint(2**31, ()))
    return seed


R = TypeVar("R")


def answer(
    prompts: Sequence[Any],
    facts: dict[str, Any],
    *,
    journal: Journal,
    jsonl: bool,
    at_once: int,
    decode: Callable[[list[int]], R],
    records: Callable[[R], list[dict[str, Any]]],
    show: Callable[[R], None],
) -> None:
    """Answer prompts in batches: into a file that resumes, as JSONL, or as text.

    ``decode`` answers the prompts of some places, and ``records`` makes a record of each. ``facts``
    are what decides the answers besides prompt and place (:func:`tta_ext.journal.resume_key`).
    Random streams are named by the place in the input, so a run that was cut short draws what it
    would have drawn.
    """
    keys = [resume_key(**facts, prompt=p, place=i) for i, p in enumerate(prompts)]
    todo = [i for i, key in enumerate(keys) if key not in journal.records]
    there = len(prompts) - len(todo)
    with progress("answers", len(prompts), there) as advance:
        for start in range(0, len(todo), at_once):
            places = todo[start : start + at_once]
            result = decode(places)
            if journal.path is None and not jsonl:
                show(result)
            else:
                items = {
                    keys[place]: {"index": place, "prompt": prompts[place], **record}
                    for place, record in zip(places, records(result), strict=True)
                }
                if journal.path is not None:
                    journal.add(items)
                else:
                    echo("".join(map(json_line, items.values())), end="")
            advance(len(places))
    if journal.path is not None:
        errors.print(f"{len(todo)} answered, {there} were there: {journal.path}")

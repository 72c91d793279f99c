"""What the commands share: consoles, model options, prompts, colours, durable files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from tta_ext.decoding import KnapsackDeferral

__all__ = ["console", "errors"]

console = Console()
errors = Console(stderr=True)

PROXY_STYLE = "bold magenta"
BASE_STYLE = "cyan"

Base = Annotated[
    str | None,
    typer.Option(help="Base model: folder, .gguf file or hub name. Default: the demo's."),
]
Proxy = Annotated[str | None, typer.Option(help="Proxy model, likewise.")]
Rule = Annotated[str, typer.Option(help="Deferral rule, or implicit_reward.")]
Param = Annotated[
    float | None, typer.Option(help="The rule's parameter (beta for implicit_reward).")
]
Critical = Annotated[str, typer.Option(help="Knapsack's critical item: exclude, include or split.")]
Temperature = Annotated[float, typer.Option(help="Temperature of both models.")]
RuleTemperature = Annotated[
    float | None, typer.Option(help="Temperature at which the rule looks at the models.")
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the most probable token.")]
Seed = Annotated[int | None, typer.Option(help="Seed; the same seed gives the same answers.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens after which an answer ends.")]
BatchSize = Annotated[int, typer.Option(help="Answers decoded together.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, float16.")]
Device = Annotated[str | None, typer.Option(help="Device of the models, such as cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch.")]

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


def set_threads(threads: int | None) -> None:
    """Limit torch's threads if asked to."""
    if threads is not None:
        import torch

        if threads < 1:
            raise ValueError(f"--threads is {threads}, expected at least 1")
        torch.set_num_threads(threads)


def quiet_transformers() -> None:
    """No progress bars and advice from transformers between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def canonical_rule(rule: str) -> str:
    """The rule's table name from any of its names."""
    from tta_ext import rules

    return rule if rule == "implicit_reward" else rules.rule_name(rule)


def default_param(rule: str, param: float | None) -> float | None:
    """The parameter given, or the rule's usual one."""
    return DEFAULT_PARAM.get(canonical_rule(rule)) if param is None else param


def load_pair(
    base: str | None,
    proxy: str | None,
    anti: str | None = None,
    *,
    rule: str = "threshold",
    param: float | None = None,
    dtype: str = "auto",
    device: str | None = None,
    **options: Any,
) -> KnapsackDeferral:
    """The models named on the command line; none named: the pair of the demo."""
    import torch

    from tta_ext.decoding import KnapsackDeferral

    if (base is None) != (proxy is None):
        raise ValueError(
            "--base and --proxy belong together (without both, the demo's pair is used)"
        )
    rule = canonical_rule(rule)
    chosen: Any = dtype
    if dtype != "auto":
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
        chosen = getattr(torch, dtype)
    if base is None or proxy is None:
        from tta_ext.demo.evaluate import ASSETS

        base, proxy = str(ASSETS / "base"), str(ASSETS / "proxy")
        anti = str(ASSETS / "proxy_init") if rule == "implicit_reward" else None
        chosen = torch.float32
    quiet_transformers()
    with errors.status("loading models"):
        return KnapsackDeferral.from_pretrained(
            base,
            proxy,
            anti=anti,
            dtype=chosen,
            device=device,
            rule=rule,
            param=default_param(rule, param),
            **options,
        )


def read_prompts(arguments: Iterable[str] | None, source: Path | None) -> list[Any]:
    """Prompts from arguments, else from a file, else from stdin.

    A file whose first line starts with ``{`` or ``[`` is JSONL: strings do not need that form; an
    object has ``prompt`` (text) or ``messages`` (a conversation), a list is a conversation. Any
    other file has a prompt on each line that is not empty.
    """
    given = list(arguments or ())
    if given and source is not None:
        raise ValueError("prompts are given both as arguments and by --input")
    if given:
        return given
    if source is not None and str(source) != "-":
        text = source.read_text(encoding="utf-8")
    elif source is None and sys.stdin.isatty():
        raise ValueError("there are no prompts: pass them as arguments, by --input or on stdin")
    else:
        text = sys.stdin.read()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the input has no prompts")
    if lines[0].lstrip()[0] not in "{[":
        return lines
    return [record_prompt(record) for record in parse_jsonl(lines)]


def parse_jsonl(lines: Iterable[str]) -> list[Any]:
    """The values of JSON lines; ``ValueError`` names the line that is none."""
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
    return records


def record_prompt(record: Any) -> Any:
    """The prompt in a JSONL record."""
    if isinstance(record, (str, list)):
        return record
    if isinstance(record, dict):
        for key in ("prompt", "messages"):
            if key in record:
                return record[key]
    raise ValueError(
        f"a JSONL record has neither 'prompt' nor 'messages': {json.dumps(record)[:80]}"
    )


def coloured(spans: Iterable[tuple[str, bool]]) -> Text:
    """Text in the colours of its sources."""
    text = Text()
    for piece, from_proxy in spans:
        text.append(piece, style=PROXY_STYLE if from_proxy else BASE_STYLE)
    return text


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(("base", BASE_STYLE), " ", ("proxy", PROXY_STYLE))


def bar() -> Progress:
    """A progress bar on stderr, so that stdout keeps only results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )


class JsonLines:
    """A JSONL file that survives a kill: whole lines only, each on the disk once written.

    Args:
        path: the file; None writes to stdout.

    Attributes:
        records: what the file held when it was opened; a line cut short by a kill is removed.
    """

    def __init__(self, path: Path | None) -> None:
        self.records: list[Any] = []
        self._file: IO[str] | None = None
        if path is None:
            return
        if path.exists():
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                with path.open("r+b") as file:
                    file.truncate(end)
            self.records = parse_jsonl(content[:end].decode().splitlines())
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[Any]) -> None:
        """Append records, durably."""
        file = self._file or sys.stdout
        file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        file.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

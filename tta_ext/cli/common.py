"""What the commands share: consoles, options, models, reports, tables."""

from __future__ import annotations

import json
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from tta_ext.files import check_output, write_file
from tta_ext.jobs import Crew, Here, Machine
from tta_ext.journal import WHOLE, Shard, strict

if TYPE_CHECKING:
    from rich.table import Table

    from tta_ext.evaluation import Models, Setting

__all__ = ["check_output", "console", "errors"]

# What is printed is text of models, paths and tokens, never markup.
console = Console(markup=False, highlight=False, emoji=False)
errors = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

# What a terminal may take for a command to itself, ends of lines and tabs apart.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_HERE = Path(__file__).resolve().parent.parent

PROXY_STYLE = "magenta"
BASE_STYLE = "cyan"


def _set_threads(threads: int | None) -> int | None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


# Chosen on the shipped pair.
DEFAULT_PARAM = {
    "knapsack": 0.9,
    "threshold": 0.4,
    "confidence_bet": 0.2,
    "nudging": 0.4,
    "relative": 0.2,
    "proxy_below": -0.3,
    "proxy_above": 0.2,
    "relative_ratio": 0.5,
    "optimal": 0.3,
    "implicit_reward": 1.0,
}

Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts; default: stdin.")]
Source = Annotated[
    Path | None,
    typer.Option("--input", help="File of prompts, one a line, or JSONL or Parquet; - is stdin."),
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
Rule = Annotated[
    str, typer.Option(help=f"Deferral rule: {', '.join(DEFAULT_PARAM)} (of experts) or argmax.")
]
Param = Annotated[
    float | None,
    typer.Option(
        help="The rule's parameter. Defaults, for the shipped pair: "
        + ", ".join(f"{name} {value:g}" for name, value in DEFAULT_PARAM.items())
        + "."
    ),
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
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Where transformers puts the layers, such as auto, in place of --device."),
]
Attention = Annotated[
    str | None,
    typer.Option("--attn-implementation", help="Attention of the models, such as sdpa or eager."),
]
Runner = Annotated[
    str | None,
    typer.Option(help="How rows are run: ragged or lockstep (default: by what each model is)."),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization-config",
        help='JSON object of transformers, such as {"load_in_4bit": true}.',
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the model (the base) on the hub.")
]
ProxyRevision = Annotated[str | None, typer.Option(help="Likewise of proxy and anti.")]
ShardOf = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="i/n: only the i-th of n parts, from 1; env: as RANK and WORLD_SIZE say.",
    ),
]
Engine = Annotated[
    Literal["here", "ray"], typer.Option(help="Who decodes: this process, or workers of Ray.")
]
WorkerCount = Annotated[int, typer.Option("--workers", min=1, help="Workers of --engine ray.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster, or auto; else Ray is started on this machine.")
]
GpusPerWorker = Annotated[float, typer.Option(min=0, help="GPUs of each worker, parts allowed.")]
Threads = Annotated[
    int | None, typer.Option(min=1, callback=_set_threads, help="Threads of torch.")
]


def refuse_unused(context: typer.Context, choice: str, unused: Collection[str]) -> None:
    """``ValueError`` if the command line has a parameter that what was chosen does not use."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")
        if parameter.name in unused and given:
            raise ValueError(f"{choice} does not use {parameter.opts[0]}")


def chosen_setting(
    context: typer.Context,
    rule: str,
    param: float | None,
    critical: str,
    others: Collection[str] = (),
) -> Setting:
    """The rule that a command's options name; ``ValueError`` for one that it does not use.

    Args:
        others: options that other rules of the same command use.
    """
    from tta_ext import rules
    from tta_ext.evaluation import IMPLICIT_REWARD, Setting

    unused = {
        IMPLICIT_REWARD: {"critical", "rule_temperature"},
        "knapsack": {"anti"},
        "argmax": {"anti", "critical", "param"},
    }
    name = rule if rule == IMPLICIT_REWARD else rules.rule_name(rule)
    refuse_unused(context, f"rule {name}", unused.get(name, {"anti", "critical"}) - set(others))
    return Setting(name, DEFAULT_PARAM.get(name) if param is None else param, critical)


def chosen_shard(context: typer.Context, *needed: str) -> Shard:
    """The part that --shard asks for; ``ValueError`` without the options that parts need."""
    text = context.params["shard"]
    for name in needed:
        if text is not None and context.params[name] is None:
            raise ValueError(f"--shard needs --{name}, the same for all parts or a file for each")
    return WHOLE if text is None else Shard.parse(text)


def chosen_crew(context: typer.Context, make: Callable[[], Machine]) -> Crew:
    """Who does a command's jobs: what ``make`` makes in this process, or in each worker of Ray."""
    options = context.params
    if options["engine"] == "here":
        unused = {"workers", "address", "gpus_per_worker"}
        refuse_unused(context, "--engine here", unused)
        return Here(make())
    from tta_ext.engines.ray.workers import Workers

    crew = Workers(
        make, options["workers"], address=options["address"], gpus=options["gpus_per_worker"],
        threads=options["threads"],
    )  # fmt: skip
    context.call_on_close(crew.close)
    return crew


def at_home(options: MutableMapping[str, Any]) -> None:
    """Let ``~`` be the home folder in a command's files, as no shell does in a config or behind
    an equals sign; else a folder of that name would be made.
    """
    for name, value in options.items():
        if isinstance(value, Path):
            options[name] = value.expanduser()


def refuse_one_file_twice(options: Mapping[str, Any]) -> None:
    """``ValueError`` if two options name one file: what one reads or writes, the other would lose.

    Args:
        options: a command's, by their names. Devices, pipes and "-" may have two uses.
    """
    known: dict[str, str] = {}
    for name, value in options.items():
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(path, Path) or str(path) == "-":
                continue
            if path.is_file() or not path.exists():
                other = known.setdefault(os.path.realpath(path), name)
                if other != name:
                    raise ValueError(f"{other} and {name} are one file, {path}; name two")


def write_report(path: Path | None, value: Any) -> None:
    """Write a JSON file if one was asked for."""
    if path is not None:
        text = json.dumps(strict(value), indent=1, allow_nan=False, default=str) + "\n"
        write_file(path, text)
        errors.print(f"written: {path}")


def sentence(error: BaseException) -> str:
    """An error in a line; where it comes from code that is not ours, with the place."""
    text = " ".join(str(error).split()) or "no more is known"
    frames = traceback.extract_tb(error.__traceback__)
    known = (ValueError, TypeError, ImportError)
    if isinstance(error, OSError) or not frames:
        return text
    if isinstance(error, known) and Path(frames[-1].filename).is_relative_to(_HERE):
        return text
    installed = sysconfig.get_paths()
    libraries = [_HERE, *(Path(installed[name]) for name in ("stdlib", "purelib", "platlib"))]
    users = [
        frame
        for frame in frames
        if not any(Path(frame.filename).is_relative_to(folder) for folder in libraries)
    ]
    place = (users or frames)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def quiet_transformers() -> None:
    """No progress bars and advice from transformers between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def loading_options(context: typer.Context) -> dict[str, Any]:
    """How a command's options want models loaded, for :func:`load_models` and its like.

    Raises:
        ValueError: the quantization is no JSON object.
    """
    names = ("dtype", "device", "device_map", "attn_implementation", "revision")
    found = {name: context.params.get(name) for name in names}
    text = context.params.get("quantization_config")
    if text is not None:
        try:
            found["quantization_config"] = json.loads(text)
        except ValueError:
            found["quantization_config"] = None
        if not isinstance(found["quantization_config"], dict):
            raise ValueError(f"--quantization-config is {text!r}, expected a JSON object")
    return found


def check_revision(name: str, revision: str | None) -> None:
    """``ValueError`` if a revision is asked of what is no repository."""
    if revision is not None and Path(name).exists():
        raise ValueError(f"{name} is no name on the hub, so it has no revision {revision}")


def load_models(
    base: str | None,
    proxy: str | None,
    anti: str | None = None,
    *,
    implicit: bool = False,
    proxy_revision: str | None = None,
    **loading: Any,
) -> Models:
    """The models named on the command line; none: the demo's, with an anti if ``implicit``.

    ``loading`` is as :func:`loading_options` has it; the revision is the base's alone.
    """
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
    check_revision(base, loading.get("revision"))
    for name in filter(None, (proxy, anti)):
        check_revision(name, proxy_revision)
    quiet_transformers()
    theirs = loading | {"revision": proxy_revision}
    with errors.status("loading models"):
        return Models(
            load_model(base, **loading),
            load_model(proxy, **theirs),
            load_tokenizer(base, revision=loading.get("revision")),
            load_tokenizer(proxy, revision=proxy_revision),
            None if anti is None else load_model(anti, **theirs),
        )


def echo(text: str, style: str | None = None, end: str = "\n", dim: bool = False) -> None:
    """Print a model's text as it is; on a terminal coloured, and without what would command it."""
    if console.is_terminal:
        text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
        if not console.no_color and (style or dim):
            text = typer.style(text, fg=style, dim=dim or None)
    print(text, end=end, flush=True)


def source_style(from_proxy: bool) -> str:
    """The colour of a token."""
    return PROXY_STYLE if from_proxy else BASE_STYLE


def echo_coloured(spans: Iterable[tuple[str, bool]]) -> None:
    """Print text in the colours of its sources."""
    for piece, from_proxy in spans:
        echo(piece, source_style(from_proxy), end="")
    echo("")


def table(name: str, *numbers: str) -> Table:
    """A table whose first column is text and the others right-aligned."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    made.add_column(name, no_wrap=True)
    for number in numbers:
        made.add_column(number, justify="right", no_wrap=True)
    return made


def show_table(shown: Table) -> None:
    """Print a table as wide as it is: neither a log nor a narrow terminal loses a digit."""
    width = console.measure(shown, options=console.options.update(max_width=10_000)).maximum
    wide = Console(width=max(width, console.width), markup=False, highlight=False, emoji=False)
    wide.print(shown, crop=False, soft_wrap=True)

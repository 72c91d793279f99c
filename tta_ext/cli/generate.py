"""``tta generate``: two models answer prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tta_ext.cli import common
from tta_ext.cli.answers import answer, chosen_seed, heading
from tta_ext.cli.config import Config
from tta_ext.cli.prompts import Asked, read_prompts
from tta_ext.jobs import Crew, Here
from tta_ext.journal import Journal, fingerprint

if TYPE_CHECKING:
    from tta_ext.decoding import Generation
    from tta_ext.evaluation import Setting

__all__ = ["generate"]

# What --method may be: a rule decides token by token, or experts tilt the base.
KAD, IMPLICIT = "kad", "implicit-reward"
# Options of this library's own loop.
NOT_IN_VLLM = {
    "anti", "runner", "top_k", "top_p", "min_p", "speculative", "draft", "stream", "colour",
    "answer_budget", "answer_spending",
    "device", "device_map", "attn_implementation", "quantization_config", "revision",
    "proxy_revision",
}  # fmt: skip


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
    top_k: Annotated[
        int | None, typer.Option(help="Only the k most probable tokens of each model.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the fewest tokens of each model with this mass.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Only tokens with this share of a model's highest probability."),
    ] = None,
    seed: common.Seed = None,
    max_new_tokens: common.MaxNewTokens = 128,
    samples: Annotated[int, typer.Option(min=1, help="Answers for each prompt.")] = 1,
    speculative: Annotated[
        str | None,
        typer.Option(help="Tokens that are drafted for the base to judge at once, or auto."),
    ] = None,
    answer_budget: Annotated[
        float | None,
        typer.Option(
            help="Share of --max-new-tokens (greedy spending) or of the answer (running) that the "
            "proxy may write."
        ),
    ] = None,
    answer_spending: Annotated[
        str | None, typer.Option(help="How it is spent: greedy (default) or running.")
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
    device_map: common.DeviceMap = None,
    attn_implementation: common.Attention = None,
    quantization_config: common.Quantization = None,
    revision: common.Revision = None,
    proxy_revision: common.ProxyRevision = None,
    shard: common.ShardOf = None,
    backend: Annotated[
        Literal["torch", "vllm"],
        typer.Option(help="What runs the models: this library's loop, or vLLM."),
    ] = "torch",
    engine: common.Engine = "here",
    workers: common.WorkerCount = 1,
    address: common.Address = None,
    gpus_per_worker: common.GpusPerWorker = 0.0,
    threads: common.Threads = None,
    runner: common.Runner = None,
    config: Config = None,
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
    if engine == "ray":
        common.refuse_unused(context, "--engine ray", {"stream", "colour"})
        if output is None:
            raise ValueError("--engine ray needs --output, as answers come in no order")
    if backend == "vllm":
        common.refuse_unused(context, "--backend vllm", NOT_IN_VLLM)
        if method == IMPLICIT or base is None or proxy is None:
            raise ValueError("--backend vllm needs a rule, --base and --proxy")
    part = common.chosen_shard(context, "seed")
    asked = read_prompts(prompts, source, chat, system)
    with Journal(part.file(output)) as journal:
        seed = chosen_seed(seed, journal)
        pair_options: dict[str, Any] = {
            "temperature": temperature,
            "rule_temperature": rule_temperature,
            "speculative": _draft_length(speculative),
            "draft": draft,
        }
        if runner is not None:
            pair_options["runner"] = runner
        options: dict[str, Any] = {
            "do_sample": not greedy,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "num_return_sequences": samples,
            "stop_strings": stop or None,
        }
        cuts: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        cuts |= {"answer_budget": answer_budget, "answer_spending": answer_spending}
        options |= {name: cut for name, cut in cuts.items() if cut is not None}

        loading = {
            "base": base, "proxy": proxy, "anti": anti, "proxy_revision": proxy_revision,
            "implicit": setting.rule == IMPLICIT_REWARD, **common.loading_options(context),
        }  # fmt: skip
        kind = _Stream if stream else _Pair
        if backend == "vllm":
            kind, loading = _VLLM, loading | {"gpus": gpus_per_worker}
        crew = common.chosen_crew(
            context, lambda: kind(loading, setting, pair_options, asked, options)
        )
        answer(
            asked,
            {
                "method": "generate",
                "models": crew.facts(),
                **setting.facts(),
                **pair_options,
                **options,
            },
            journal=journal,
            jsonl=jsonl,
            shard=part,
            at_once=1 if stream else max(1, batch_size // samples),
            crew=crew,
            records=lambda result: _records(result, samples),
            show=lambda result, places: _print(crew, result, colour, asked, places),
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


class _Pair:
    """The models, and how they answer: a :class:`tta_ext.jobs.Machine`."""

    def __init__(
        self,
        loading: dict[str, Any],
        setting: Setting,
        pair_options: dict[str, Any],
        asked: Sequence[Asked],
        options: dict[str, Any],
    ) -> None:
        self.kad, self.facts = self.load(loading, setting, pair_options)
        self.kad.request([[0]], **options)  # what is wrong with them is no prompt's fault
        self.asked, self.options = asked, options

    def load(
        self, loading: dict[str, Any], setting: Setting, pair_options: dict[str, Any]
    ) -> tuple[Any, Callable[[], dict[str, Any]]]:
        """What answers, and the facts of its models."""
        models = common.load_models(**loading)
        return models.decoder(setting, **pair_options), models.facts

    def arguments(self, places: list[int]) -> dict[str, Any]:
        """Of the call that answers some places."""
        samples = self.options["num_return_sequences"]
        sequence = [place * samples + j for place in places for j in range(samples)]
        from tta_ext.decoding.runtime.prompts import PromptList

        prompts = PromptList(self.asked[place].prompt for place in places)
        return {"prompts": prompts, "sequence": sequence, **self.options}

    def decode(self, what: None, places: list[int]) -> Generation | None:
        return self.kad.generate(**self.arguments(places))


class _VLLM(_Pair):
    """The pair in vLLM; of several GPUs each has a part of every layer."""

    def load(
        self, loading: dict[str, Any], setting: Setting, pair_options: dict[str, Any]
    ) -> tuple[Any, Callable[[], dict[str, Any]]]:
        from tta_ext.engines.vllm.offline import OfflinePair
        from tta_ext.engines.vllm.pair import write_pair
        from tta_ext.rules import Rule

        named = {name: loading[name] for name in ("base", "proxy")}
        temperatures = {name: pair_options[name] for name in ("temperature", "rule_temperature")}
        rule = Rule(setting.rule, setting.param, setting.critical, **temperatures)
        self.folder = TemporaryDirectory()
        pair = write_pair(named["base"], named["proxy"], self.folder.name)
        size = max(1, int(loading["gpus"]))
        engine = OfflinePair(pair, rule, dtype=loading["dtype"], tensor_parallel_size=size)
        import vllm  # a pair has told if it is missing

        def facts() -> dict[str, Any]:
            return {"backend": "vllm", "vllm": vllm.__version__, "tensor_parallel_size": size} | {
                name: {"fingerprint": fingerprint(source), "dtype": loading["dtype"]}
                for name, source in named.items()
            }

        return engine, facts


class _Stream(_Pair):
    """Prints answers as they come; several to one prompt wait for their end."""

    def decode(self, what: None, places: list[int]) -> None:
        heading(self.asked, places[0])
        texts = [""] * self.options["num_return_sequences"]
        for event in self.kad.stream(**self.arguments(places)):
            if len(texts) == 1:
                common.echo(event.text or "", common.source_style(event.deferred), end="")
            texts[event.row] += event.text or ""
        if len(texts) > 1:
            common.echo("\n".join(texts))
        common.echo("")


def _records(result: Generation | None, samples: int) -> list[dict[str, Any]]:
    assert result is not None
    return [
        {
            "texts": (result.texts or [])[at : at + samples],
            "finish": result.finish[at : at + samples],
            "tokens": result.tokens[at : at + samples],
            "deferred": [[int(flag) for flag in row] for row in result.deferred[at : at + samples]],
        }
        for at in range(0, len(result), samples)
    ]


def _print(
    crew: Crew,
    result: Generation | None,
    colour: bool,
    asked: Sequence[Asked],
    places: Sequence[int],
) -> None:
    if result is None:  # streamed
        return
    texts = result.texts or []
    samples = len(texts) // len(places)
    for row, text in enumerate(texts):
        heading(asked, places[row // samples], samples)
        if colour:
            assert isinstance(crew, Here) and isinstance(crew.machine, _Pair)
            common.echo_coloured(result.source_spans(row, crew.machine.kad.tokenizer))
        else:
            common.echo(text)

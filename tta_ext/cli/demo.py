"""``tta demo``: the shipped pair on held-out problems, in under a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean as mean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.text import Text

from tta_ext.cli import common
from tta_ext.cli.common import console
from tta_ext.cli.config import Config
from tta_ext.cli.evaluate import row_table
from tta_ext.cli.progress import progress

if TYPE_CHECKING:
    from tta_ext.decoding import KnapsackDeferral
    from tta_ext.decoding.rewards import Reward
    from tta_ext.evaluation import Models

__all__ = ["demo"]


def demo(
    n: Annotated[int, typer.Option(min=1, help="Held-out problems in the table.")] = 100,
    answers: Annotated[int, typer.Option(min=0, help="Answers to show.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    threads: common.Threads = 1,  # the pair is too small to gain from more
    config: Config = None,
) -> None:
    """Accuracy of rules on the shipped pair, answers coloured by source, and where time went."""
    from tta_ext.demo.task import evaluation_problems, evaluation_task
    from tta_ext.evaluation import MODES, SHORT, Setting, evaluate

    start = time.perf_counter()
    models = common.load_models(None, None, implicit=True)
    task = evaluation_task(n)
    console.print(
        f"base {_size(models.base)}, can compute but mostly answers at once; proxy "
        f"{_size(models.proxy)}, works step by step but cannot compute; {n} held-out problems"
    )
    with progress("problems", n * len(SHORT) * len(MODES)) as advance:
        rows = list(evaluate(models, task, seed=seed, progress=advance))
    common.show_table(row_table(rows))
    console.print()

    setting = Setting("threshold", 0.4)
    kad = models.decoder(setting)
    problems = evaluation_problems(max(16, answers))
    prompts = [problem.prompt for problem in problems[:16]]
    if answers:
        coloured = console.is_terminal and not console.no_color
        legend = Text("the proxy's tokens in « »")
        if coloured:
            names = ("base", common.BASE_STYLE), " ", ("proxy", common.PROXY_STYLE)
            legend = Text.assemble("tokens by ", *names)
        console.print(f"sampled with {setting.label},", legend)
        shown = kad.generate(
            [p.prompt for p in problems[:answers]], seed=seed, max_new_tokens=task.max_new_tokens
        )
        for row, problem in enumerate(problems[:answers]):
            spans = shown.source_spans(row, kad.tokenizer)
            text = Text.assemble(
                *(
                    (piece if coloured or not proxy else f"«{piece}»", common.source_style(proxy))
                    for piece, proxy in spans
                )
            )
            console.print(problem.question, style="dim")
            console.print(Panel(text, expand=False))
    _where_time_went(kad, prompts, seed)
    _show_aisp(models, seed)
    console.print(f"whole demo: {time.perf_counter() - start:.1f} s")


def _size(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def _where_time_went(kad: KnapsackDeferral, prompts: list[str], seed: int) -> None:
    """Time split of the loop, and the ops one by one on the loop's own logits."""
    options: dict[str, Any] = {"seed": seed, "max_new_tokens": 48, "eos_token_id": []}
    kad.generate(prompts, **options)
    columns = "base", "proxy", "all else", "share", "tokens/s", "proxy calls"
    table = common.table("time of the loop", *columns)
    for name, chosen in ((f"batch of {len(prompts)}", prompts), ("batch of 1", prompts[:1])):
        stats = kad.generate(chosen, **options).stats
        table.add_row(
            name,
            f"{stats.base_seconds:.3f} s",
            f"{stats.proxy_seconds:.3f} s",
            f"{stats.other_seconds:.3f} s",
            f"{stats.other_share:.1%}",
            f"{stats.tokens_per_second:.0f}",
            f"{stats.proxy_calls} in {stats.steps} steps",
        )
    common.show_table(table)
    console.print()
    _time_ops(kad, prompts, seed)


def _time_ops(kad: KnapsackDeferral, prompts: list[str], seed: int) -> None:
    import torch
    from torch.utils.benchmark import Timer

    from tta_ext import ops, rng
    from tta_ext.doctor import diagnose

    found = diagnose()
    served = {op.name: op.backend for op in found.ops}
    ids = [torch.tensor([kad.tokenizer(prompt)["input_ids"]]) for prompt in prompts]
    with torch.inference_mode():
        base, proxy = (
            torch.cat([model(prompt).logits[:, -1, : kad.vocabulary.size] for prompt in ids])
            for model in (kad.base, kad.proxies[0])
        )
    rows = len(prompts)
    rule: dict[str, Any] = {"rule": "threshold", "param": 0.4}
    knapsack: dict[str, Any] = {"rule": "knapsack", "param": 0.9}
    key: dict[str, Any] = {
        "seed": torch.tensor([seed]), "position": torch.full((rows,), 40),
        "sequence": torch.arange(rows),
    }  # fmt: skip
    beta = torch.ones(1)
    calls: dict[str, Callable[[], Any]] = {
        "deferral_propose": lambda: ops.deferral_propose(base, **rule, **key),
        "categorical_sample": lambda: ops.categorical_sample(proxy, stream=rng.PROXY, **key),
        "deferral_sample": lambda: ops.deferral_sample(base, proxy, **knapsack, **key),
        "deferral_probs": lambda: ops.deferral_probs(base, proxy, **knapsack),
        "deferral_stats": lambda: ops.deferral_stats(base, **knapsack),
        "implicit_reward_sample": lambda: ops.implicit_reward_sample(
            base, proxy[None], None, beta, **key
        ),
    }
    table = common.table("op", "backend", "µs a call")
    for name, call in calls.items():
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=0.1).median
        table.add_row(name, served[name], f"{seconds * 1e6:.1f}")
    where = f"instruction set {found.cpu_isa}" if found.cpu_isa else found.native.reason
    console.print(f"{where}; {rows} rows of {base.shape[1]} logits, op alone", soft_wrap=True)
    common.show_table(table)


def _show_aisp(models: Models, seed: int) -> None:
    """AISP against best-of-n, on the pair's base.

    The reward is the right number, which leaves the language to the model. One that pays for words,
    letters or a length is won by answers that are nothing else.
    """
    from tta_ext.demo.task import evaluation_problems, lenient_answer

    problems = evaluation_problems(4)
    answers = {problem.prompt: problem.answer for problem in problems}

    def right(prompts: list[Any], responses: list[Any]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        return [float(lenient_answer(text) == answers[prompt]) for prompt, text in pairs]

    console.print(
        f"\nAISP on the base alone: noise on the pre-logits learns the right number, for "
        f"{len(problems)} problems; {problems[0].question!r}",
        soft_wrap=True,
    )
    _search(models.base, models.tokenizer, list(answers), right, 48, seed)


def _search(
    model: Any, tokenizer: Any, prompts: list[Any], reward: Reward, tokens: int, seed: int
) -> None:
    """Show the rewards of AISP and of best-of-n, and of the first prompt two answers each."""
    from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN

    parts = model, reward, tokenizer
    options: dict[str, Any] = {"max_new_tokens": tokens}
    steered = AdaptiveImportanceSampling(*parts, n=8, iterations=3, **options)
    plain = BestOfN(*parts, n=24, group=8, probe=False, **options)
    for method in (steered, plain):
        result = method.generate(prompts, seed=seed)
        means = [
            mean([record.mean for record in records])
            for records in zip(*result.curves, strict=True)
        ]
        best, last = result.best[0], result.candidates[0][-1]
        found = mean([one.reward for one in result.best])
        common.echo(
            f"{result.method}: mean reward by iteration {' '.join(f'{one:.2f}' for one in means)}, "
            f"of the best answers {found:.2f}, in {result.timing.total:.1f} s\n"
            f"  best, {best.reward:.2f}: {best.text!r}\n"
            f"  the last, {last.reward:.2f}: {last.text!r}"
        )

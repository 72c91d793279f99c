"""Every causal language model class of the installed transformers, here and by ``generate``.

    python -m benchmarks architectures [FAMILY ...] [--output FILE]

Two tiny models of a family (:mod:`benchmarks.tiny_models`) are base and proxy. Right means equal to
``generate`` on the same batch, padded on the left, and independent of the batch wherever
``generate`` is, by its logits. Where greedy answers differ, the logits of ``generate`` tell a tie
(the two tokens no further apart than rounding) from a fault. Each family runs in a process of its
own; what is done is kept beside the output, and a run that was cut off, or was of some families,
goes on there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from . import harness
from .tiny_models import PAD, families, tiny_model

NEW = 8
SEEDS = (3, 4, 5)
LENGTHS = (11, 2, 6)
CHECKS = {
    "never": "a KAD that never defers is the base's greedy answer",
    "always": "one that always defers is the proxy's",
    "drafts": "speculative=3 answers as without",
    "alone": "three rows of a batch answer as alone",
    "best of n": "AISP with sigma=0 is best-of-n",
    "noise": "AISP's default noise moves the logits by what it promises",
}
QUICK = ("never", "always", "best of n", "noise")  # for the test-suite
RIGHT = ("right", "tie", "as generate")
Answers = list[list[int]]


def prompts() -> Answers:
    """Three prompts of different length."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 100, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def greedy(model: Any, rows: Answers) -> tuple[Answers, list[torch.Tensor]]:
    """What ``generate`` answers to a batch, and the logits ``[rows, V]`` of each step."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, width:].tolist(), list(out.logits)


def compared(got: Answers, want: Answers, logits: Sequence[torch.Tensor]) -> str:
    """``right``, ``tie`` or ``wrong``, with the margin in standard deviations of the logits."""
    verdict = "right"
    for row, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        step = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        if step is None:
            continue
        scores = logits[step][row].double()
        margin = float(scores[theirs[step]] - scores[mine[step]])
        if not margin <= 2e-5 * float(scores.abs().max()):
            return f"wrong: row {row}, token {step}, margin {margin / float(scores.std()):.2g}"
        verdict = "tie"
    return verdict


def sampled(one: Callable[[int], Answers], other: Callable[[int], Answers]) -> str:
    """Whether two ways of drawing agree: rounding moves a draw once in many, a fault each time."""
    if one(SEEDS[0]) == other(SEEDS[0]):
        return "right"
    wrong = [seed for seed in SEEDS[1:] if one(seed) != other(seed)]
    return f"wrong: seeds {SEEDS[0]}, {wrong}" if wrong else "tie"


def reference(models: Sequence[Any], alone: bool = True) -> dict[str, Any]:
    """What ``generate`` does with a family; an error if it fails by itself.

    Args:
        models: base and proxy.
        alone: find out whether it answers rows of a batch as alone.
    """
    rows = prompts()
    found = [greedy(model, rows) for model in models]
    if not all(torch.isfinite(step).all() for _, logits in found for step in logits[:2]):
        raise ValueError("logits are not finite")
    single = [greedy(models[0], [row]) for row in rows] if alone else []
    apart = [_same(i, found[0], one) for i, one in enumerate(single)]
    return {"found": found, "independent": all(apart)}


def _same(row: int, batch: tuple[Answers, Any], alone: tuple[Answers, Any]) -> bool:
    """Whether a row's logits are those of the row alone, as long as its tokens are."""
    same = True
    for step, (mine, single) in enumerate(zip(batch[1], alone[1], strict=True)):
        difference = float((mine[row] - single[0]).abs().max())
        same = same and difference <= 1e-3 * float(single.abs().max())
        if batch[0][row][step] != alone[0][0][step]:
            break
    return same


def checks(
    models: Sequence[Any], known: dict[str, Any], names: Collection[str] = tuple(CHECKS)
) -> dict[str, str]:
    """The verdict of each check; a refusal is a verdict, anything else that is raised a fault."""
    from tta_ext import AdaptiveImportanceSampling, BestOfN, KnapsackDeferral

    base, rows, verdicts = models[0], prompts(), {}
    kad = KnapsackDeferral(*models, rule="threshold", param=0.3)
    fits = kad.fits
    verdicts["runner"] = "/".join(fit.kind for fit in fits)

    def whole(param: float, number: int) -> str:
        """A KAD of one model alone, against that model's ``generate``."""
        got = kad.generate(
            rows, param=param, seed=0, do_sample=False, max_new_tokens=NEW, eos_token_id=[],
            pad_token_id=PAD,
        ).tokens  # fmt: skip
        if not fits[number].apart(max(LENGTHS) + NEW):
            return compared(got, *known["found"][number])
        # Rows that disturb each other in generate() are run apart here.
        single = [greedy(models[number], [row]) for row in rows]
        parts = [compared([mine], *one) for mine, one in zip(got, single, strict=True)]
        return next((part for part in parts if part != "right"), "right")

    def draw(seed: int, some: Answers = rows, first: int = 0, **more: Any) -> Answers:
        ids = list(range(first, first + len(some)))
        return kad.generate(
            some, seed=seed, sequence=ids, max_new_tokens=NEW, eos_token_id=[], **more
        ).tokens

    def alone() -> str:
        verdict = sampled(draw, lambda s: [draw(s, [row], i)[0] for i, row in enumerate(rows)])
        return verdict if known["independent"] or verdict in RIGHT else "as generate"

    def reward(_: Any, answers: Sequence[Any]) -> list[float]:
        return [float(len(set(answer))) for answer in answers]

    settings: Any = {"max_new_tokens": 4, "eos_token_id": [], "decoding": "sample"}
    aisp = AdaptiveImportanceSampling(base, reward, n=4, iterations=2, **settings)

    def best_of_n() -> str:
        plain = BestOfN(base, reward, n=8, group=4, **settings).generate(rows, seed=1)
        zero = aisp.generate(rows, seed=1, sigma=0.0)
        same = [[one.tokens for row in found.candidates for one in row] for found in (zero, plain)]
        return "right" if same[0] == same[1] else "wrong: other tokens"

    run = {
        "never": lambda: whole(0.0, 0),
        "always": lambda: whole(1.01, 1),
        "drafts": lambda: sampled(draw, lambda seed: draw(seed, speculative=3)),
        "alone": alone,
        "best of n": best_of_n,
        "noise": lambda: noise(aisp, rows),
    }
    return verdicts | {name: run[name]() for name in names}


@torch.inference_mode()
def noise(aisp: Any, rows: Answers) -> str:
    """How far the default noise moves the first step's logits, against what is promised."""
    from tta_ext.decoding.search.scales import LOGIT_NOISE

    changes = []
    for row in rows:
        search = aisp.start([row], seed=2, n=16)
        job = search.job([(0, rollout) for rollout in range(16)])
        moved = search.engine.rollouts(job).logits()[:16].double()
        changes.append(moved - search.engine.rollouts(type(job)(job.cells, 0)).logits().double())
    change = float(torch.stack(changes).std())
    low, high = 0.6 * LOGIT_NOISE, 1.6 * LOGIT_NOISE
    return "right" if low <= change <= high else f"wrong: by {change:.3g}, promised {LOGIT_NOISE}"


def judge(family: str) -> dict[str, str]:
    """A family's verdicts: of ``generate``, and of each check."""
    warnings.filterwarnings("ignore")
    verdict = {"class": families()[family], "generate": "", "refused": "", "error": ""}
    try:
        models = [tiny_model(family, seed) for seed in (0, 1)]
    except Exception as error:
        return verdict | {"error": f"not built: {_line(error)}"}
    try:
        known = reference(models)
    except Exception as error:
        return verdict | {"generate": _line(error)}
    verdict["generate"] = "rows alone" if known["independent"] else "rows depend"
    try:
        return verdict | checks(models, known)
    except (TypeError, ValueError) as error:
        if type(models[0]).__name__ in str(error):
            return verdict | {"refused": " ".join(str(error).split())}
        return verdict | {"error": _line(error)}
    except Exception as error:
        return verdict | {"error": _line(error)}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def outcome(row: dict[str, str]) -> str:
    """Right, wrong, refused, a traceback, or left out as ``generate`` itself fails."""
    if row["error"].startswith("not built"):
        return "not built"
    if not row["generate"].startswith("rows"):
        return "left out"
    if row["error"]:
        return "traceback"
    if row["refused"]:
        return "refused"
    return "right" if all(row.get(name) in RIGHT for name in CHECKS) else "wrong"


def _child(family: str, answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put(judge(family))


def run(family: str, seconds: float) -> dict[str, str]:
    """:func:`judge` in a process of its own."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_child, args=(family, answers))
    child.start()
    try:
        while True:
            try:
                return answers.get(timeout=min(seconds, 1.0))
            except queue.Empty:
                seconds -= 1.0
                if seconds <= 0 or not child.is_alive():
                    what = "took too long" if child.is_alive() else f"exit {child.exitcode}"
                    cls = families()[family]
                    return {"class": cls, "generate": what, "refused": "", "error": ""}
    finally:
        child.kill()
        child.join()


def table(rows: dict[str, dict[str, str]]) -> str:
    """Counts, then a line a family."""
    ends = ("right", "wrong", "refused", "traceback", "left out", "not built")
    count = dict.fromkeys(ends, 0)
    for row in rows.values():
        count[outcome(row)] += 1
    judged = sum(count[end] for end in ends[:4])
    lines = [
        f"{count['right']} of {judged} right, {count['wrong']} wrong, {count['refused']} refused, "
        f"{count['traceback']} in a traceback. Not in this count are {count['left out']} whose own "
        f"`generate` fails on this batch, and {count['not built']} whose class raises when a tiny "
        "one is made:",
        "",
        *(
            f"- {name} ({row['class']}): {row['generate'] or row['error']}"
            for name, row in sorted(rows.items())
            if outcome(row) in ("left out", "not built")
        ),
        "",
        "The checks:",
        "",
        *(f"- **{name}**: {what}." for name, what in CHECKS.items()),
        "",
        "`tie`: the tokens differ, their logits by no more than rounding. `as generate`: rows "
        "depend on the batch's padding in `generate` too.",
        "",
    ]
    head = ["family", "class", "runner", "generate", *CHECKS, "outcome"]
    body = []
    for name, row in sorted(rows.items()):
        runner = row.get("runner", "")
        both = runner.split("/")
        body.append(
            [name, row["class"], both[0] if len(set(both)) == 1 else runner]
            + [row["generate"] if row["generate"].startswith("rows") else "fails"]
            + [row.get(check, "") for check in CHECKS]
            + [
                f"{outcome(row)}{': ' if row['refused'] or row['error'] else ''}"
                f"{row['refused'] or row['error']}"
            ]
        )
    cells = [head, ["---"] * len(head), *body]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status is 1 if a family is wrong or ends in a traceback."""
    p = argparse.ArgumentParser(prog="python -m benchmarks architectures")
    p.add_argument("families", nargs="*", metavar="FAMILY", help="by transformers' name (all)")
    p.add_argument("--seconds", type=float, default=240.0, help="for each family at most (240)")
    p.add_argument("--output", type=Path, help="where to write the table")
    args = p.parse_args(argv)
    harness.check_files(args.output)
    import transformers
    from transformers import GenerationMixin, PreTrainedModel  # noqa: F401  # once for all children

    import tta_ext.decoding  # noqa: F401

    transformers.logging.set_verbosity_error()
    names = args.families or list(families())
    state = args.output and args.output.with_suffix(".jsonl")
    rows: dict[str, dict[str, str]] = {}
    if state and state.exists():
        for line in state.read_text().splitlines():
            one = json.loads(line)
            rows[one.pop("family")] = one
    for name in names:
        if name not in families():
            p.error(f"no family {name!r} in transformers {transformers.__version__}")
        if name not in rows:
            rows[name] = run(name, args.seconds)
            if state:
                with state.open("a") as file:
                    file.write(json.dumps({"family": name} | rows[name]) + "\n")
        print(name, outcome(rows[name]), {k: v for k, v in rows[name].items() if v}, flush=True)
    if args.output:
        command = ["python", "-m", "benchmarks", "architectures", *(argv or ())]
        harness.report(command, table(rows), args.output)
        if not args.families:
            state.unlink()
    else:
        print(table(rows))
    return int(any(outcome(row) in ("wrong", "traceback") for row in rows.values()))

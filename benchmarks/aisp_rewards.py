"""Searches by reward on a real model, as a sceptic would look at them.

``python -m benchmarks.aisp_rewards`` runs SmolLM2-135M-Instruct on prompts that were not used to
choose any setting: AISP in three forms beside its rivals, over rewards, answer lengths and budgets,
at equal samples and at equal seconds. Beside the reward, which a search gets by whatever means, it
prints what the means were: the divergence from the base model, how surprising the answer is to the
base, how little it repeats itself (diversity) and how close it stays to the prompt (coherence),
with standard errors over prompts, and the paired difference to best-of-n with wins, ties and
losses.

Two rewards are words' (one letter, a lexicon of sentiment): kept as warnings. Two are learned:
``style``, closeness of a sentence embedding to a wanted text, and ``preference``, a reward model
of :mod:`benchmarks.preference`, in a file: another processor's rounding would train another one.
Best-of-n and its soft form do not look at the reward while they draw: at equal samples their
answers are drawn once and scored by every reward.

The whole grid takes days of a core. Everything finished is on the disk before the next begins (a
folder, ``--work``), so that a run may be cut short anywhere: the same command goes on, one with
other axes adds to it, and ``--table`` prints what there is. Prompts come in blocks, all cells of
one before the next, so that every cell has some (``--part`` names the blocks). ``--answers FILE``
keeps every answer in a CSV file, other machines' too: the table is of all that are in it.
``--tune`` uses the other prompts: settings are chosen there, and value functions trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tta_ext.decoding import BestOfN, load_value, train_value
from tta_ext.decoding.rewards import (
    DiversityReward,
    EmbeddingReward,
    Reward,
    call_reward,
    parse_reward,
)
from tta_ext.decoding.runtime.prompts import encode_prompts
from tta_ext.decoding.search import compare as comparison
from tta_ext.decoding.search.best_of_n import soft_choice
from tta_ext.decoding.search.outcome import SearchResult, spread
from tta_ext.demo import smollm2
from tta_ext.files import check_output, write_file
from tta_ext.journal import Journal, Shard, fingerprint, model_facts, resume_key, run_facts

from . import aisp_table, harness, preference
from .aisp_table import Cell

WANTED = "A warm letter to an old friend, full of thanks and fond memories of summers by the sea."
REWARDS = ("preference", "letter:s", "style", "sentiment")
LENGTHS = (24, 64, 128)
SAMPLES = (64, 256, 1024)
SECONDS = (10.0, 60.0)
PARTS = 6
PREFERENCE = Path(__file__).parent / "results" / "preference.safetensors"
BASELINE = "best_of_n"
# {value}: file of the reward's value function; {weight}: a standard deviation of the reward, among
# the answers that trained it, weighs 2 nats; soft: a quarter of that deviation.
METHODS = {
    BASELINE: "best_of_n:group=16",
    "soft": "best_of_n:group=16,soft={soft}",
    "aisp_paper": "aisp:coherence=0.0,decoding=sample,kl_budget=inf",
    "aisp_shared": "aisp:coherence=1.0,kl_budget=inf",
    "fisher_shared": "aisp:coherence=1.0,guard=fisher,kl_budget=inf",
    "aisp_unbounded": "aisp:kl_budget=inf",
    "fisher_unbounded": "aisp:guard=fisher,kl_budget=inf",
    "aisp": "aisp",
    "aisp_fisher": "aisp:guard=fisher",
    "re_control": "re_control:value={value},n=16,kl_rollouts=4",
    "chunk_beam": "chunk_beam:chunk=8",
    "args": "args:weight={weight}",
}
POOLED = (BASELINE, "soft")
TRAINING_ANSWERS = 8

TUNING = (
    "Describe a quiet village.",
    "What is a good hobby?",
    "Write about the moon.",
    "Give me some advice.",
    "Tell me about trains.",
    "What did you do today?",
    "Describe a strange machine.",
    "What makes a good teacher?",
    "Write about an old house.",
    "Tell me something about rivers.",
    "What should I cook tonight?",
    "Describe the colour blue.",
)

EVALUATION = (
    "Tell me a short story.",
    "Describe your favourite place.",
    "What happens in a forest at night?",
    "Write a line about the sea.",
    "How was the weather yesterday?",
    "Tell me about a friend of yours.",
    "What is in the garden?",
    "Describe a busy market.",
    "Write about a long journey.",
    "What do cats do all day?",
    "Tell me about your school.",
    "What is music good for?",
    "Describe a winter morning.",
    "Give me a reason to read books.",
    "Write about a lost key.",
    "What can be seen from a mountain?",
    "Tell me about a famous painter.",
    "What is the best way to travel?",
    "Describe a meal you remember.",
    "Write about a small bird.",
    "What do people talk about at dinner?",
    "Tell me about the city at dawn.",
    "What would you do with a free day?",
    "Describe a game for children.",
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.aisp_rewards", description=__doc__)
    p.add_argument("--reward", nargs="+", default=list(REWARDS), help="rewards (%(default)s)")
    p.add_argument(
        "--method", nargs="+", default=list(METHODS),
        help=f"of {', '.join(METHODS)}, or LABEL=METHOD:NAME=VALUE,... (all)",
    )  # fmt: skip
    p.add_argument("--length", nargs="+", type=int, default=list(LENGTHS), help="tokens an answer")
    p.add_argument("--samples", nargs="*", type=int, help="answers a prompt (64 256 1024)")
    p.add_argument("--seconds", nargs="*", type=float, help="seconds a prompt (10 60)")
    p.add_argument(
        "--part", nargs="+", type=int, choices=range(1, PARTS + 1), default=range(1, PARTS + 1),
        help=f"blocks of prompts: every {PARTS}th, from this one on (all)",
    )  # fmt: skip
    p.add_argument("--tune", action="store_true", help="the prompts for choosing settings")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument(
        "--preference", type=Path, default=PREFERENCE,
        help="file of the learned reward; trained where there is none (that of all in the table)",
    )  # fmt: skip
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--work", type=Path, default=Path("aisp_rewards"), help="folder of the journal")
    p.add_argument("--table", action="store_true", help="only print what is finished")
    p.add_argument("--output", type=Path, help="where to write the table")
    p.add_argument("--plot", type=Path, help="picture of gains over best-of-n, and of diversity")
    p.add_argument("--answers", type=Path, help="CSV file of all answers; is added to (none)")
    return p


def conversations(prompts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def slug(name: str) -> str:
    return name.replace(":", "_")


def rescored(
    result: SearchResult, at: int, reward: Reward, choose: Callable[[Sequence[float]], int]
) -> dict[str, Any]:
    """The record of one prompt of best-of-n, as if it had been drawn for another reward."""
    begin = perf_counter()
    candidates = result.candidates[at]
    texts = [one.text for one in candidates]
    values = call_reward(reward, [result.prompts[at]] * len(candidates), texts)
    record = comparison.record_of(result, at)
    taken = perf_counter() - begin
    best = -float("inf")
    for point in record["curve"]:
        own = [
            value
            for value, one in zip(values, candidates, strict=True)
            if one.iteration == point["iteration"]
        ]
        mean, highest, deviation = spread(own)
        best = max(best, highest)
        point.update(mean=mean, max=highest, std=deviation, best=best)
    for name in ("total", "reward"):
        record["timing"][name] += taken
    winner = choose(values)
    return record | {"reward": values[winner], "text": candidates[winner].text}


class Surprise:
    """Minus the mean log-probability of an answer's tokens under a model, in nats: a metric."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [self._of(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]

    def _of(self, prompt: Any, text: str) -> float:
        (asked,) = encode_prompts([prompt], self.tokenizer)
        said = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not said:
            return 0.0
        ids = torch.tensor([asked + said])
        logits = self.model(ids, logits_to_keep=len(said) + 1).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, len(asked) :]))


class Bench:
    """Models, rewards and value functions, loaded or made where they are first needed.

    Args:
        args: of :func:`parser`.
        journal: of finished answers.
        loaded: model, tokenizer and encoder in place of SmolLM2 and all-MiniLM-L6-v2.
    """

    def __init__(
        self, args: argparse.Namespace, journal: Journal, loaded: tuple[Any, ...] | None = None
    ) -> None:
        self.args, self.journal = args, journal
        self.prompts = conversations(TUNING if args.tune else EVALUATION)
        if loaded is None:
            loaded = (
                *smollm2.load(dtype=getattr(torch, args.dtype)),
                EmbeddingReward.from_pretrained(preference.encoder_folder()),
            )
        self.model, self.tokenizer, self.coherence = loaded
        self.rewards: dict[str, Reward] = {}

    @cached_property
    def metrics(self) -> dict[str, Reward]:
        return {
            "surprise": Surprise(self.model, self.tokenizer),
            "diversity": DiversityReward(),
            "coherence": self.coherence,
        }

    def reward(self, name: str) -> Reward:
        if name not in self.rewards:
            self.rewards[name] = self._reward(name)
        return self.rewards[name]

    def _reward(self, name: str) -> Reward:
        if name == "style":
            return EmbeddingReward(self.coherence.model, self.coherence.tokenizer, WANTED)
        if name != "preference":
            return parse_reward(name)
        path = self.args.preference
        if not path.is_file():
            preference.make(path, self.model, self.tokenizer, self.coherence)
        return preference.PreferenceReward.load(self.coherence, path)

    def value_file(self, cell: Cell) -> Path:
        """The value function of a reward at a length, trained on the tuning prompts."""
        path = Path(self.args.work) / f"value-{slug(cell.reward)}-{cell.length}.safetensors"
        if not path.is_file():
            train_value(
                self.model, self.reward(cell.reward), conversations(TUNING), self.tokenizer,
                n=TRAINING_ANSWERS, max_new_tokens=cell.length, batch_size=64, seed=self.args.seed,
            ).save(path)  # fmt: skip
        return path

    def tag(self, cell: Cell) -> dict[str, Any]:
        self.reward(cell.reward)  # makes the file that it is known by
        file = self.args.preference if cell.reward == "preference" else None
        return {
            "model": model_facts(self.model),
            "reward": cell.reward,
            "file": None if file is None else fingerprint(str(file)),
            "wanted": WANTED if cell.reward == "style" else None,
            "length": cell.length,
            "budget": cell.budget,
            "prompts": "tuning" if self.args.tune else "evaluation",
        }

    def contestant(self, method: str, cell: Cell) -> comparison.Contestant:
        text = METHODS.get(method, method)
        names = {}
        if "{" in text:
            path = self.value_file(cell)
            deviation = float(load_value(path).deviation)
            names = {"value": path, "weight": 2.0 / deviation, "soft": 0.25 * deviation}
        label = f"{method}=" if method in METHODS else ""
        return comparison.Contestant.parse(label + text.format(**names))

    # ---- the work ------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """The axes' cells; the budgets' defaults count where neither is given."""
        samples, seconds = self.args.samples, self.args.seconds
        if samples is None and seconds is None:
            samples, seconds = SAMPLES, SECONDS
        budgets = [(n, None) for n in samples or ()] + [(None, s) for s in seconds or ()]
        return [
            Cell(reward, length, *budget)
            for length in self.args.length
            for budget in budgets
            for reward in self.args.reward
        ]

    def run(self) -> None:
        """Every cell of every block of prompts, but what the journal has."""
        cells = self.cells()
        for number in self.args.part:
            part = Shard(number, PARTS)
            for draw in dict.fromkeys(c._replace(reward="") for c in cells if c.samples):
                self.pool([c for c in cells if c._replace(reward="") == draw], part)
            for cell in cells:
                pooled = POOLED if cell.samples else ()
                self.search(cell, [m for m in self.args.method if m not in pooled], part)

    def search(self, cell: Cell, methods: Sequence[str], part: Shard) -> None:
        begin = perf_counter()

        def told(answers: int, tokens: int) -> None:
            if tokens:
                what = f"part {part.number}: {cell.reward}, {cell.length} tokens, {cell.budget}"
                print(f"{what}: {answers} answers, {perf_counter() - begin:.0f} s", flush=True)

        comparison.compare(
            self.model,
            self.tokenizer,
            self.reward(cell.reward),
            self.prompts,
            [self.contestant(method, cell) for method in methods],
            samples=cell.samples,
            seconds=cell.seconds,
            seed=self.args.seed,
            common={"max_new_tokens": cell.length},
            # A limit in seconds is a batch's.
            prompts_at_once=1 if cell.samples is None else len(self.prompts),
            shard=part,
            tag=self.tag(cell),
            journal=self.journal,
            progress=told,
        )

    def pool(self, cells: Sequence[Cell], part: Shard) -> None:
        """Best-of-n's answers, drawn once, with a record for every reward and choice."""
        wanted, places = {}, part.of(range(len(self.prompts)))
        for cell in cells:
            for method in POOLED:
                if method not in self.args.method:
                    continue
                one = self.contestant(method, cell)
                settings: Any = one.resolved({"max_new_tokens": cell.length}, cell.samples, None)
                how = {
                    "method": one.method, "seed": self.args.seed, "tag": self.tag(cell),
                    "settings": asdict(settings),
                }  # fmt: skip
                for place in places:
                    key = resume_key(**how, prompt=self.prompts[place], place=place)
                    if key not in self.journal.records:
                        wanted[key] = cell, method, place, settings, run_facts(**how)
        if not wanted:
            return
        cell = cells[0]
        drawn = BestOfN(
            self.model, preference.indifferent, self.tokenizer, n=cell.samples or 1, group=16,
            max_new_tokens=cell.length,
        )  # fmt: skip
        result = drawn.generate(
            [self.prompts[p] for p in places], seed=self.args.seed, sequence=list(places)
        )
        items = {}
        for key, (cell, method, place, settings, run) in wanted.items():
            choose = self._choice(settings.soft, place)
            record = rescored(result, places.index(place), self.reward(cell.reward), choose)
            items[key] = {"index": place, "label": method, **record, "run": run}
        self.journal.add(items)
        print(f"part {part.number}: {cell.length} tokens, {cell.budget}: best-of-n", flush=True)

    def _choice(self, soft: float, place: int) -> Callable[[Sequence[float]], int]:
        def choose(values: Sequence[float]) -> int:
            if soft == 0.0:
                return values.index(max(values))
            return soft_choice(values, soft, self.args.seed, place)

        return choose

    # ---- what there is -------------------------------------------------------------------------

    def finished(self) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
        """All cells of the journal, those of the asked prompts, with their records and metrics."""
        found: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
        which = "tuning" if self.args.tune else "evaluation"
        for record in self.journal.records.values():
            tag = record.get("run", {}).get("tag", {})
            if tag.get("prompts") == which:
                key = tag["reward"], tag["length"], tag["budget"]
                found.setdefault(key, {}).setdefault(record["label"], []).append(record)
        for key, labels in found.items():
            # Of a label that has had several settings, the last.
            kept = [r for rows in labels.values() for r in rows if r["run"] == rows[-1]["run"]]
            yield Cell.of(*key), [r | {"metrics": self.measured(r)} for r in kept]

    def measured(self, record: dict[str, Any]) -> dict[str, float]:
        """The metrics of an answer; they too are kept."""
        what = {"prompt": record["prompt"], "text": record["text"]}
        key = resume_key(metrics=list(self.metrics), model=model_facts(self.model), **what)
        if key not in self.journal.records:
            fresh = record | {}
            comparison.measure([fresh], self.metrics)
            self.journal.add({key: what | {"metrics": fresh["metrics"]}})
        found: dict[str, float] = self.journal.records[key]["metrics"]
        return found


def main() -> None:
    args = parser().parse_args()
    harness.check_files(args.output, args.plot)
    check_output(args.answers, aisp_table.MARK)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    with Journal(args.work / "journal.jsonl") as journal:
        bench = Bench(args, journal)
        if not args.table:
            bench.run()
        cells = aisp_table.merged((), bench.finished())
        if args.answers is not None:
            if args.answers.exists():
                older = aisp_table.from_csv(args.answers.read_text(), EVALUATION)
                cells = aisp_table.merged(older, cells)
            write_file(args.answers, aisp_table.as_csv(cells))
        body = aisp_table.document(cells, BASELINE, list(METHODS))
        if args.preference.is_file():
            head = preference.PreferenceReward.load(bench.coherence, args.preference).head
            body += f"\n\n{preference.described(head.facts)}\n"
    if args.plot is not None:
        aisp_table.draw(cells, args.plot, BASELINE, list(METHODS))
    harness.report(["python", "-m", "benchmarks.aisp_rewards", *sys.argv[1:]], body, args.output)


if __name__ == "__main__":
    main()

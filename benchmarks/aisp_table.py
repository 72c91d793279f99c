"""What ``aisp_rewards`` leaves: every answer as a line of a CSV file, a table, a picture."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from tta_ext import plots
from tta_ext.decoding.search import compare as comparison

from . import harness

HEADER = (
    "tokens", "budget", "method", "prompts", "reward", "- best_of_n", "won/tied/lost", "KL",
    "KL of u", "surprise", "diversity", "coherence", "asked", "trained on", "seconds",
)  # fmt: skip
NOTES = """\
Means over prompts ± one standard error. KL: nats an answer from the base model, measured on
rollouts of the last round, the noise's own part included; KL of u: what u alone has moved
(`kl_fisher`). Of best-of-n no KL is measured; log n - (n - 1) / n bounds it. Surprise: nats a
token of the answer under the base model. Asked: answers that the reward was asked about for a
prompt, unfinished ones included; trained on: answers that the value function was trained on,
once for all prompts. Seconds of wall-clock a prompt, on a machine that other work shared."""
METRICS = ("surprise", "diversity", "coherence")
POINT = ("mean", "samples", "kl", "kl_fisher")  # of the last round
COLUMNS = (
    "reward", "tokens", "budget", "method", "prompt", "score", *POINT, *METRICS, "asked tokens",
    "seconds", "trained on", "text",
)  # fmt: skip
MARK = re.compile(re.escape(",".join(COLUMNS)).encode())


class Cell(NamedTuple):
    """One reward, length and budget."""

    reward: str
    length: int
    samples: int | None
    seconds: float | None

    @property
    def budget(self) -> str:
        return f"{self.samples} samples" if self.seconds is None else f"{self.seconds:g} s"

    @classmethod
    def of(cls, reward: str, length: int, budget: str) -> Cell:
        number, unit = budget.split()
        limit = (int(number), None) if unit == "samples" else (None, float(number))
        return cls(reward, length, *limit)

    @property
    def order(self) -> tuple[str, int, float, int]:
        return self.reward, self.length, self.seconds or 0.0, self.samples or 0


Cells = Iterable[tuple[Cell, list[dict[str, Any]]]]


# ---- every answer --------------------------------------------------------------------------------


def as_csv(cells: Cells) -> str:
    """A line an answer, of the figures that the table is made of."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell, records in cells:
        for record in sorted(records, key=lambda r: (r["label"], r["index"])):
            point, timing = record["curve"][-1], record["timing"]
            figures = [record["reward"], *(point[name] for name in POINT)]
            figures += [record["metrics"][name] for name in METRICS]
            figures += [timing["tokens"], timing["total"]]
            writer.writerow(
                [cell.reward, cell.length, cell.budget, record["label"], record["index"]]
                + ["" if one is None else f"{one:.6g}" for one in figures]
                + [record["training"], record["text"]]
            )
    return text.getvalue()


def from_csv(text: str, prompts: Sequence[str]) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Cells and what the table needs of their records, from :func:`as_csv`."""

    def cell_of(row: dict[str, str]) -> Cell:
        return Cell.of(row["reward"], int(row["tokens"]), row["budget"])

    def number(value: str) -> float | None:
        return float(value) if value else None

    rows = csv.DictReader(StringIO(text))
    for cell, lines in groupby(sorted(rows, key=lambda r: cell_of(r).order), cell_of):
        yield (
            cell,
            [
                {
                    "label": row["method"],
                    "index": int(row["prompt"]),
                    "prompt": prompts[int(row["prompt"])],
                    "reward": float(row["score"]),
                    "text": row["text"],
                    "curve": [{name: number(row[name]) for name in POINT}],
                    "timing": {
                        "tokens": number(row["asked tokens"]),
                        "total": number(row["seconds"]),
                    },
                    "metrics": {name: float(row[name]) for name in METRICS},
                    "training": int(row["trained on"]),
                }
                for row in lines
            ],
        )


def merged(older: Cells, newer: Cells) -> list[tuple[Cell, list[dict[str, Any]]]]:
    """All answers, the newer ones where both have one."""
    found: dict[Cell, dict[tuple[str, int], dict[str, Any]]] = {}
    for cells in (older, newer):
        for cell, records in cells:
            found.setdefault(cell, {}).update({(r["label"], r["index"]): r for r in records})
    return [(cell, list(found[cell].values())) for cell in sorted(found, key=lambda c: c.order)]


# ---- the table -----------------------------------------------------------------------------------


def document(cells: Cells, baseline: str, order: Sequence[str]) -> str:
    """A table a reward, each with one prompt's answers of its first cell."""
    parts = [NOTES]
    for reward, group in groupby(cells, lambda item: item[0].reward):
        mine = list(group)
        lines = [line for cell, records in mine for line in _lines(cell, records, baseline, order)]
        parts += [f"## {reward}", harness.table(HEADER, lines), _answers(*mine[0], order)]
    return "\n\n".join(parts)


def _sorted(records: Iterable[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    places = {label: place for place, label in enumerate(order)}
    return sorted(records, key=lambda r: (places.get(r["label"], len(places)), r["index"]))


def _pairs(records: list[dict[str, Any]], baseline: str) -> dict[str, comparison.Paired]:
    if all(r["label"] != baseline for r in records):
        return {}
    return {pair.label: pair for pair in comparison.paired(records, baseline)}


def _lines(
    cell: Cell, records: list[dict[str, Any]], baseline: str, order: Sequence[str]
) -> Iterator[list[str]]:
    pairs = _pairs(records, baseline)
    for row in comparison.summary(_sorted(records, order)):
        pair, metrics = pairs.get(row["label"]), row["metrics"]
        yield [
            str(cell.length),
            cell.budget,
            row["label"],
            str(row["prompts"]),
            _pm(row["reward"], row["error"]),
            f"{_pm(pair.difference, pair.error, '+')}" if pair else "",
            f"{pair.wins}/{pair.ties}/{pair.losses}" if pair else "",
            _pm(row["kl"], row["kl_error"], digits=1),
            _pm(row["kl_fisher"], row["kl_fisher_error"], digits=1),
            *(_pm(metrics[name][0], metrics[name][1], digits=2) for name in METRICS),
            f"{row['asked']:.0f}",
            str(row["training"] or ""),
            f"{row['seconds']:.1f}",
        ]


def _answers(cell: Cell, records: list[dict[str, Any]], order: Sequence[str]) -> str:
    first = min(r["index"] for r in records)
    mine = [r for r in _sorted(records, order) if r["index"] == first]
    prompt = mine[0]["prompt"]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    title = f"answer to: {asked} ({cell.length} tokens, {cell.budget})"
    return harness.table(("method", title), [(r["label"], _quoted(r["text"])) for r in mine])


def _pm(value: float | None, error: float | None, sign: str = "", digits: int = 3) -> str:
    if value is None or error is None:
        return ""
    middle = f"{value:{sign}.{digits}f}"
    return f"{middle} ± {error:.{digits}f}" if error == error else middle


def _quoted(text: str) -> str:
    return shorten(text.replace("`", "'"), 110, placeholder=" ...")


# ---- the picture ---------------------------------------------------------------------------------


def draw(cells: Cells, path: Path, baseline: str, order: Sequence[str]) -> None:
    """A column a reward: gains over best-of-n, and diversity, by length and budget."""
    by_reward = [
        (reward, list(group)) for reward, group in groupby(cells, lambda item: item[0].reward)
    ]
    figure = plots.new_figure()
    figure.set_size_inches(4.2 * max(len(by_reward), 1), 6.4)
    axes = figure.subplots(2, max(len(by_reward), 1), squeeze=False)
    handles: dict[str, Any] = {}
    for (gain, diversity), (reward, mine) in zip(axes.T, by_reward, strict=False):
        for x, (_, records) in enumerate(mine):
            pairs = _pairs(records, baseline)
            rows = comparison.summary(_sorted(records, order))
            for place, row in enumerate(rows):
                label = row["label"]
                color = f"C{order.index(label) if label in order else len(order)}"
                at = x + 0.7 * (place / max(len(rows) - 1, 1) - 0.5)
                style = {"fmt": "o", "markersize": 3, "color": color, "label": label}
                if label in pairs:
                    pair = pairs[label]
                    gain.errorbar(at, pair.difference, yerr=pair.error, **style)
                middle, error = row["metrics"]["diversity"]
                handles[label] = diversity.errorbar(at, middle, yerr=error, **style)
        diversity.set_ylim(-0.04, 1.04)
        gain.axhline(0.0, color="grey", linewidth=0.8)
        gain.set_title(reward)
        names = [f"{cell.length} tokens\n{cell.budget}" for cell, _ in mine]
        for panel in (gain, diversity):
            panel.set_xticks(range(len(names)), names, fontsize="x-small", rotation=45)
            panel.grid(alpha=0.3)
        gain.set_ylabel(f"reward - {baseline}")
        diversity.set_ylabel("diversity")
    if handles:
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=4, fontsize="small"
        )
    plots.save(figure, path)

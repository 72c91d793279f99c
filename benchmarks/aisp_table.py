"""The table and the picture of ``aisp_rewards``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from tta_ext import plots
from tta_ext.decoding.search import compare as comparison

from . import harness

HEADER = (
    "method", "prompts", "reward", "- best_of_n", "won/tied/lost", "KL", "KL of u",
    "surprise", "diversity", "coherence", "asked", "trained on", "seconds",
)  # fmt: skip
NOTES = """\
Means over prompts ± one standard error. KL: nats an answer from the base model, measured on
rollouts of the last round, the noise's own part included; KL of u: what u alone has moved
(`kl_fisher`). Of best-of-n no KL is measured; log n - (n - 1) / n bounds it. Surprise: nats a
token of the answer under the base model. Asked: answers that the reward was asked about for a
prompt, unfinished ones included; trained on: answers that the value function was trained on,
once for all prompts. Seconds of wall-clock a prompt, on a machine that other work shared."""

Cells = Sequence[tuple[Any, list[dict[str, Any]]]]


def document(cells: Cells, baseline: str, order: Sequence[str]) -> str:
    """A table a cell, with the first prompt's answers below it."""
    return "\n\n".join([NOTES, *(_cell(cell, rows, baseline, order) for cell, rows in cells)])


def _cell(cell: Any, records: list[dict[str, Any]], baseline: str, order: Sequence[str]) -> str:
    places = {label: place for place, label in enumerate(order)}
    records = sorted(records, key=lambda r: (places.get(r["label"], len(places)), r["index"]))
    labels = dict.fromkeys(r["label"] for r in records)
    pairs = {}
    if baseline in labels:
        pairs = {pair.label: pair for pair in comparison.paired(records, baseline)}
    lines = []
    for row in comparison.summary(records):
        pair, metrics = pairs.get(row["label"]), row["metrics"]
        lines.append(
            [
                row["label"],
                str(row["prompts"]),
                _pm(row["reward"], row["error"]),
                f"{_pm(pair.difference, pair.error, '+')}" if pair else "",
                f"{pair.wins}/{pair.ties}/{pair.losses}" if pair else "",
                _pm(row["kl"], row["kl_error"], digits=1),
                _pm(row["kl_fisher"], row["kl_fisher_error"], digits=1),
                *(
                    _pm(metrics[name][0], metrics[name][1], digits=2)
                    for name in ("surprise", "diversity", "coherence")
                ),
                f"{row['asked']:.0f}",
                str(row["training"] or ""),
                f"{row['seconds']:.1f}",
            ]
        )
    first = min(r["index"] for r in records)
    answers = [(r["label"], _quoted(r["text"])) for r in records if r["index"] == first]
    asked = next(r["prompt"][-1]["content"] for r in records if r["index"] == first)
    return "\n\n".join(
        [
            f"## {cell.reward}, {cell.length} tokens, {cell.budget}",
            harness.table(HEADER, lines),
            harness.table(("method", f"answer to: {asked}"), answers),
        ]
    )


def _pm(value: float | None, error: float | None, sign: str = "", digits: int = 3) -> str:
    if value is None or error is None:
        return ""
    middle = f"{value:{sign}.{digits}f}"
    return f"{middle} ± {error:.{digits}f}" if error == error else middle


def _quoted(text: str) -> str:
    return shorten(text.replace("`", "'"), 110, placeholder=" ...")


def draw(cells: Cells, path: Path) -> None:
    """Rewards against diversity, and against surprise: a column a cell, a point a method."""
    figure = plots.new_figure()
    count = max(len(cells), 1)
    figure.set_size_inches(3.4 * count, 6.4)
    axes = figure.subplots(2, count, squeeze=False)
    labels = list(dict.fromkeys(r["label"] for _, rows in cells for r in rows))
    for column, (cell, records) in enumerate(cells):
        for row in comparison.summary(records):
            for at, name in zip(axes[:, column], ("diversity", "surprise"), strict=True):
                x, wide = row["metrics"][name]
                at.errorbar(
                    x, row["reward"], yerr=row["error"], xerr=wide, fmt="o", markersize=4,
                    color=f"C{labels.index(row['label'])}", label=row["label"],
                )  # fmt: skip
        axes[0, column].set_title(
            f"{cell.reward}, {cell.length} tokens,\n{cell.budget}", fontsize="small"
        )
        axes[0, column].set_xlabel("diversity")
        axes[1, column].set_xlabel("surprise, nats a token")
        for at in axes[:, column]:
            at.set_ylabel("reward")
            at.grid(alpha=0.3)
    if cells:
        handles: dict[str, Any] = {}
        for at in axes[0]:
            for handle, label in zip(*at.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=4, fontsize="small"
        )
    plots.save(figure, path)

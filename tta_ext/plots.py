"""Pictures by matplotlib of comparisons, sweeps and benchmarks, and the curves in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import stdev
from typing import Any

from tta_ext._version import install
from tta_ext.files import write_file

__all__ = [
    "MARK",
    "by_label",
    "check_plot",
    "curve_means",
    "mean",
    "mean_and_error",
    "new_figure",
    "plot",
    "plot_bench",
    "plot_rows",
    "save",
]

# Kinds of pictures, and what each calls the program that made it: a plot of ours is known by that.
_MADE_BY = {".pdf": "Creator", ".png": "Software", ".svg": "Creator"}
_MAKER = "tta_ext"
MARK = re.compile(rb"(?s)(?:%PDF|\x89PNG|<\?xml).*" + _MAKER.encode())


def by_label(records: Iterable[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Records by label, then by the prompt's place."""
    table: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        table.setdefault(record["label"], {})[record["index"]] = record
    return table


def mean(values: Sequence[float]) -> float:
    """The mean, infinities of both signs allowed."""
    # Not statistics.fmean, which refuses infinities of both signs: rewards may be -inf.
    return sum(values) / len(values)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan where it cannot be had)."""
    middle = mean(values) if values else math.nan
    if len(values) < 2 or not math.isfinite(middle):
        return middle, math.nan
    return middle, stdev(values) / math.sqrt(len(values))


def curve_means(
    records: Iterable[dict[str, Any]], axis: str, points: int = 100
) -> dict[str, tuple[list[float], list[float]]]:
    """Best reward so far, averaged over prompts, against samples asked for, tokens or seconds.

    Args:
        records: of :func:`tta_ext.decoding.search.compare.compare`.
        axis: ``"samples"``, ``"tokens"`` or ``"seconds"``.
        points: of the seconds axis; the others take the values that occur.

    Returns:
        For each contestant (x, y), beginning where every prompt has an answer.
    """
    found = {}
    for label, answers in by_label(records).items():
        xs, values = best_so_far(answers.values(), axis, points)
        found[label] = xs, [mean(row) for row in values]
    return found


def best_so_far(
    answers: Iterable[dict[str, Any]], axis: str, points: int = 100
) -> tuple[list[float], list[list[float]]]:
    """As :func:`curve_means` for one contestant: at each x the prompts' best rewards."""
    if axis not in ("samples", "tokens", "seconds"):
        raise ValueError(f"axis is {axis!r}, expected samples, tokens or seconds")
    curves = [[(c[axis], c["best"]) for c in item["curve"]] for item in answers]
    start = max(curve[0][0] for curve in curves)
    end = max(curve[-1][0] for curve in curves)
    if axis == "seconds":
        xs = [start + (end - start) * i / max(points - 1, 1) for i in range(points)]
    else:
        xs = sorted({x for curve in curves for x, _ in curve if x >= start})
    # Steps: the best so far stays until a later iteration betters it.
    return xs, [[[best for at, best in c if at <= x][-1] for c in curves] for x in xs]


def by_iteration(answers: Iterable[dict[str, Any]], *names: str) -> dict[str, list[list[float]]]:
    """Fields of the curves: for each iteration that all prompts have had, the prompts' values.

    Iterations in which one of the fields is None are left out.
    """
    columns = list(zip(*(item["curve"] for item in answers), strict=False))
    kept = [c for c in columns if all(point[name] is not None for point in c for name in names)]
    return {name: [[point[name] for point in column] for column in kept] for name in names}


def check_plot(path: Path) -> None:
    """An error before the work if a picture cannot be drawn after it.

    Args:
        path: the picture; its ending says of which kind.

    Raises:
        ImportError: matplotlib is missing; the message has the command.
        ValueError: the file's name has no ending of a picture.
    """
    new_figure()
    _kind(path)


def _kind(path: str | Path) -> str:
    """What kind of picture a file is, by its name's ending."""
    kind = Path(path).suffix.lower()
    if kind not in _MADE_BY:
        raise ValueError(f"{path} has no ending of a picture, expected {', '.join(_MADE_BY)}")
    return kind


def save(figure: Any, path: str | Path) -> None:
    """Write a figure, marked as ours, as what its file's ending says."""
    import matplotlib

    kind = _kind(path)
    drawn = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words stay words, not outlines
        figure.savefig(drawn, dpi=150, format=kind[1:], metadata={_MADE_BY[kind]: _MAKER})
    write_file(Path(path), drawn.getvalue())


def plot(records: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw a comparison, with bands of one standard error over the prompts. Needs matplotlib.

    Best reward so far against answers scored and against seconds; the mean reward of each iteration
    against answers scored and, of methods that measure it, against the KL divergence.

    Args:
        records: of :func:`tta_ext.decoding.search.compare.compare`.
        path: the picture; its ending says of which kind.
        title: stands above.

    Raises:
        ImportError: matplotlib is missing; the message has the command.
    """
    figure = new_figure()
    figure.set_size_inches(9, 7)
    axes = figure.subplots(2, 2)
    for label, table in by_label(records).items():
        answers = [table[place] for place in sorted(table)]
        for at, axis in zip(axes[0], ("samples", "seconds"), strict=True):
            xs, values = best_so_far(answers, axis)
            _curve(at, xs, values, label, steps=True)
        found = by_iteration(answers, "samples", "mean")
        _curve(axes[1][0], list(map(mean, found["samples"])), found["mean"], label)
        found = by_iteration(answers, "kl", "mean")
        if found["kl"]:
            _curve(axes[1][1], list(map(mean, found["kl"])), found["mean"], label)
    names = ["answers scored", "seconds a prompt", "answers scored", "KL, nats an answer"]
    for place, (at, name) in enumerate(zip(axes.flat, names, strict=True)):
        at.set_xlabel(name)
        at.set_ylabel("best reward so far" if place < 2 else "mean reward of the iteration")
        at.grid(alpha=0.3)
        if at.lines:
            at.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def _curve(
    axes: Any, xs: Sequence[float], values: Sequence[Sequence[float]], label: str,
    steps: bool = False,
) -> None:  # fmt: skip
    """A line with its band; a point is marked where something was measured."""
    pairs = [mean_and_error(row) for row in values]
    ys = [middle if math.isfinite(middle) else math.nan for middle, _ in pairs]
    errors = [error if math.isfinite(error) else 0.0 for _, error in pairs]
    drawn = axes.plot(
        xs, ys, label=label, drawstyle="steps-post" if steps else "default",
        marker=None if steps and len(xs) > 1 else "o", markersize=3,
    )  # fmt: skip
    low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(
        xs, low, high, step="post" if steps else None, color=drawn[0].get_color(), alpha=0.2
    )


def plot_rows(
    rows: Sequence[Any], path: str | Path, title: str = "", along: str | None = None
) -> None:
    """Draw exact match with 95% Wilson intervals, and proxy calls.

    Args:
        rows: of :func:`tta_ext.evaluation.evaluate`.
        path: the picture; its ending says of which kind.
        title: stands above.
        along: the rule whose parameter is the x axis; None: the settings stand side by side.

    Raises:
        ImportError: matplotlib is missing; the message has the command.
    """
    figure = new_figure()
    axes = figure.subplots()
    labels = list(dict.fromkeys(row.setting.label for row in rows))
    for mode in dict.fromkeys(row.mode for row in rows):
        chosen = [row for row in rows if row.mode == mode]
        xs = [float(labels.index(row.setting.label)) for row in chosen]
        if along is not None:
            chosen.sort(key=lambda row: row.setting.param or 0.0)
            xs = [row.setting.param or 0.0 for row in chosen]
        exact = [row.exact for row in chosen]
        low, high = zip(*(row.exact_interval for row in chosen), strict=True)
        form = {"marker": "o", "linestyle": "none" if along is None else "-"}
        (line,) = axes.plot(xs, exact, label=f"{mode}: exact", **form)
        axes.vlines(xs, low, high, color=line.get_color(), alpha=0.5)
        calls = [row.proxy_call_rate for row in chosen]
        form |= {"marker": "x"} | ({} if along is None else {"linestyle": "--"})
        axes.plot(xs, calls, color=line.get_color(), label=f"{mode}: proxy calls a token", **form)
    if along is None:
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    else:
        axes.set_xlabel(f"parameter of {along}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(title, fontsize="medium")
    save(figure, path)


def plot_bench(rows: Sequence[Any], path: str | Path, title: str = "") -> None:
    """Draw times against the vocabulary: a panel for each operator and dtype, a line a provider.

    Args:
        rows: of ``benchmarks.harness.run_case``; those that failed their check are left out.
        path: the picture; its ending says of which kind.
        title: stands above.

    Raises:
        ImportError: matplotlib is missing; the message has the command.
        ValueError: no row passed its check.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if not row.error:
            panel = panels.setdefault(f"{row.op}, {row.dtype}", {})
            # Rules and batches beside each other: a line each.
            line = panel.setdefault(f"{row.provider}: {row.variant}, {row.batch} rows", {})
            line[row.vocab] = row.us["q50"]
    if not panels:
        raise ValueError("no row passed its check, so there is nothing to draw")
    figure = new_figure()
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure.set_size_inches(7 * columns, 4 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for at, (name, panel) in zip(axes, panels.items(), strict=False):
        for label, points in panel.items():
            xs = sorted(points)
            at.plot(xs, [points[x] for x in xs], marker="o", markersize=3, label=label)
        at.set_title(name, fontsize="medium")
        at.set_xscale("log")
        at.set_yscale("log")
        at.set_xlabel("vocabulary")
        at.set_ylabel("µs a call, median")
        at.grid(alpha=0.3)
        at.legend(fontsize="x-small")
    for at in list(axes)[len(panels) :]:
        at.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def new_figure() -> Any:
    """An empty figure of matplotlib.

    Raises:
        ImportError: it is missing; the message has the command.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(f"plots need matplotlib: {install('plot')}") from None
    return Figure(layout="constrained")

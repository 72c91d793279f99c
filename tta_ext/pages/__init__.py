"""Results as HTML pages that need nothing else: no network, no script, no second file.

They can be read on a phone and in the dark. What a model has written is escaped, and characters
that cannot be seen or that turn the direction of what follows are shown by their names.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from tta_ext._version import __version__, install
from tta_ext.decoding import Generation, SearchResult
from tta_ext.decoding.runtime.prompts import text_of
from tta_ext.decoding.search.outcome import Candidate, IterationRecord

__all__ = ["MARK", "deferral_page", "search_page"]

# What every page holds near its beginning.
MARK = re.compile(rb'(?s)<!DOCTYPE html>.*content="tta_ext ')
# Answers that a page of a search lists.
MOST_ANSWERS = 50

# Curves of a search: title, then fields of its records and their names.
CHARTS: dict[str, dict[str, str]] = {
    "Reward": {"mean": "mean", "max": "highest", "best": "best so far"},
    "Effective sample size": {"ess": "ESS"},
    "Norm of u": {"norm": "|u|"},
    "Divergence from the base, nats": {"kl": "measured KL", "kl_bound": "|u|²/(2σ²)"},
}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 360, 180, 52, 10, 350, 156


def deferral_page(
    result: Generation, tokenizer: Any, row: int = 0, facts: Mapping[str, Any] | None = None
) -> str:
    """An answer of two models, each token coloured by who wrote it, with its account.

    Args:
        result: of :meth:`tta_ext.KnapsackDeferral.generate` with ``trace=True``.
        tokenizer: makes text of its ids.
        row: which of its answers.
        facts: names and values for the line under the title, before those of the result.

    Returns:
        HTML.

    Raises:
        ValueError: the result has no trace.
        ImportError: Jinja2 is missing; the message has the command.
    """
    if result.trace is None:
        raise ValueError("the generation has no trace; call generate(..., trace=True)")

    def text(token: int) -> str:
        return text_of(tokenizer, [token], special=True)

    written = _pieces(result.tokens[row], tokenizer)
    tokens = []
    for one, piece in zip(result.trace[row], written, strict=True):
        seen = [{"text": text(choice.token), **asdict(choice)} for choice in one.candidates]
        critical = None if one.critical is None else text(one.critical)
        tokens.append(asdict(one) | {"text": piece, "critical": critical, "candidates": seen})
    proxy = sum(one.source == "proxy" for one in result.trace[row])
    shown = {
        **(facts or {}),
        "tokens": f"{len(tokens)}, {proxy} by the proxy",
        "ended by": result.finish[row],
        "seed": result.seed,
        "sequence": result.sequence[row],
    }
    prompt = text_of(tokenizer, result.prompt_tokens[row], special=True)
    return _render("deferral.html.j2", prompt=prompt, tokens=tokens, facts=shown)


def search_page(
    result: SearchResult, prompt: int = 0, facts: Mapping[str, Any] | None = None
) -> str:
    """A prompt of a search: its best answer, the curves of its iterations, its answers by reward.

    Args:
        result: of any method of search.
        prompt: which of its prompts.
        facts: names and values for the line under the title, before those of the result.

    Returns:
        HTML.

    Raises:
        ImportError: Jinja2 is missing; the message has the command.
    """
    curve = result.curves[prompt]
    columns = [name for name, value in asdict(curve[0]).items() if value is not None]
    shown = {
        "method": result.method,
        **(facts or {}),
        "answers scored": len(result.candidates[prompt]),
        "ended by": result.stopped[prompt],
        "seed": result.seed,
        "sequence": result.sequence[prompt],
    }
    ranked = sorted(result.candidates[prompt], key=lambda one: -one.reward)
    asked = result.prompts[prompt]
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        asked = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in asked)
    return _render(
        "search.html.j2",
        prompt=str(asked),
        best=_answer(result.best[prompt]),
        answers=[_answer(one) for one in ranked[:MOST_ANSWERS]],
        charts=[chart for title in CHARTS if (chart := _chart(curve, title))],
        columns=columns,
        rows=[[getattr(one, name) for name in columns] for one in curve],
        facts=shown,
    )


def _answer(one: Candidate) -> dict[str, Any]:
    return asdict(one) | {"text": str(one.tokens) if one.text is None else one.text}


def _pieces(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; ◌ where it is a part of a character."""
    pieces, written, start = [], "", 0
    for end in range(1, len(tokens) + 1):
        if text_of(tokenizer, tokens[start:end], special=True).endswith("�") and end < len(tokens):
            pieces.append("◌")
            continue
        text = text_of(tokenizer, tokens[:end], special=True)
        pieces.append(text[len(written) :])
        written, start = text, end
    return pieces


def _chart(curve: Sequence[IterationRecord], title: str) -> dict[str, Any] | None:
    """Points of a chart in the picture's units; None if the method has none of its fields."""
    values = {
        name: [
            (one.iteration, float(getattr(one, field)))
            for one in curve
            if getattr(one, field) is not None
        ]
        for field, name in CHARTS[title].items()
    }
    finite = [value for points in values.values() for _, value in points if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if _number(low) == _number(high):
        high = low  # what rounding differs by is no curve
    first, last = curve[0].iteration, curve[-1].iteration

    def x(iteration: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * (iteration - first) / max(last - first, 1), 1)

    def y(value: float) -> float:
        # Halves, as the difference of two large numbers may overflow.
        share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    lines = [
        {
            "name": name,
            "points": [
                (x(at), y(value), f"iteration {at}: {name} {_number(value)}")
                for at, value in points
                if math.isfinite(value)
            ],
        }
        for name, points in values.items()
        if points
    ]
    ticks = [(y(value), _number(value)) for value in dict.fromkeys((low, high))]
    return {
        "title": title, "lines": lines, "ticks": ticks, "width": WIDTH, "height": HEIGHT,
        "left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM,
        "first": f"iteration {first}", "last": last,
    }  # fmt: skip


# ---- text ----------------------------------------------------------------------------------------


def _visible(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a text, and whether each is as it was written (else it names a character).

    Controls, surrogates and what turns the direction of text have no look of their own, or are
    none that HTML may hold; an end of line is shown and kept.
    """
    start = 0
    for at, character in enumerate(text):
        kind = unicodedata.category(character)
        if kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\t\u200d":
            continue
        if start < at:
            yield text[start:at], True
        start = at + 1
        if character == "\n":
            yield "↵", False
            yield "\n", True
        elif character < " ":
            yield chr(0x2400 + ord(character)), False
        else:
            yield f"[U+{ord(character):04X}]", False
    if start < len(text):
        yield text[start:], True


def _quoted(text: str) -> str:
    """A token in a table: spaces can be seen, and ends of lines break nothing."""
    return text.replace("\n", "\u240a").replace(" ", "␣") or "∅"


def _probability(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _share(mu: float) -> str:
    return {0.0: "", 1.0: "yes"}.get(mu, f"{mu:.2f}")


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, (int, str)) else f"{value:.4g}"


@lru_cache(maxsize=1)
def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError:
        raise ImportError(f"pages need Jinja2: {install('cli')}") from None
    made = Environment(
        loader=PackageLoader("tta_ext.pages"), autoescape=True, undefined=StrictUndefined
    )
    made.filters |= {
        "visible": _visible,
        "quoted": _quoted,
        "probability": _probability,
        "share": _share,
        "number": _number,
    }
    return made


def _render(template: str, **values: Any) -> str:
    html: str = _environment().get_template(template).render(version=__version__, **values)
    return html

"""Pages of traces and searches: what they say and escape, and what Chromium shows of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from commands import call

from tta_ext.decoding import Candidate, Generation, IterationRecord, SearchResult, TokenTrace
from tta_ext.decoding.deferral.trace import TokenChoice
from tta_ext.pages import MARK, deferral_page, search_page

# What a model may write: markup, a turn of direction, controls, a character in two tokens.
PIECES = ["The ", "</script><script>alert(1)</script>", "\u202egnp", "\x00\x1b[31m", "\n", "&amp;"]
EURO = "€".encode()


class Tokenizer:
    """Ids of :data:`PIECES`; behind them the euro sign in two parts."""

    def decode(self, ids: list[int], **options: bool) -> str:
        known = [piece.encode() for piece in PIECES] + [EURO[:1], EURO[1:]]
        return b"".join(known[i] for i in ids).decode(errors="replace")


def generation() -> Generation:
    tokens = list(range(len(PIECES) + 2))
    trace = [
        TokenTrace(
            token, "proxy" if token % 2 else "base", 0.25 + token / 100, 0.5, 0.125, 0, 0.125,
            cut=0.0625, candidates=[TokenChoice(0, 0.9, 0.1, 0.0), TokenChoice(1, 3e-7, None, 1.0)],
        )
        for token in tokens
    ]  # fmt: skip
    return Generation(
        tokens=[tokens], deferred=[[bool(t % 2) for t in tokens]], finish=["eos"],
        prompt_tokens=[[1, 0]], texts=[""], sequence=[0], seed=7, trace=[trace],
    )  # fmt: skip


def searched(rounds: int = 5, **dropped: None) -> SearchResult:
    curve = [
        IterationRecord(
            iteration=i, samples=4 * (i + 1), mean=0.1 * i, max=0.2 * i, std=0.1, best=0.2 * i,
            length=8.0, distinct=4, tokens=32, seconds=1.0,
            **({"ess": 2.5, "norm": 1.5 * i, "kl": 3.0, "kl_bound": 0.5} | dropped),
        )
        for i in range(rounds)
    ]  # fmt: skip
    found = [Candidate(PIECES[i % 6], [i], 0.1 * i, i, 0, "eos") for i in range(rounds)]
    return SearchResult("aisp", ["<b>prompt"], [found[-1]], [found], [curve], [""], 0, [0])


def test_a_page_is_whole_and_holds_nothing_that_runs(tmp_path: Path) -> None:
    for html in (deferral_page(generation(), Tokenizer()), search_page(searched())):
        assert MARK.match(html.encode()[: 1 << 16])
        assert html.encode().decode() == html
        assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?://", html)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


def test_without_a_trace_there_is_no_page() -> None:
    result = generation()
    result.trace = None
    with pytest.raises(ValueError, match="no trace; call generate"):
        deferral_page(result, Tokenizer())


def test_what_a_method_does_not_measure_is_no_chart() -> None:
    assert search_page(searched()).count("<svg") == 4
    nothing: dict[str, None] = {"ess": None, "norm": None, "kl": None, "kl_bound": None}
    html = search_page(searched(**nothing))
    assert html.count("<svg") == 1
    assert "ESS" not in html
    # One round, equal values, infinite ones.
    assert search_page(searched(1)).count("<svg") == 4


def test_the_command_writes_both_pages(capsys: Any, tmp_path: Path) -> None:
    html, lines = tmp_path / "t.html", tmp_path / "t.jsonl"
    words = ["trace", "--max-new-tokens", "4", "Q: 1+1?", "--html", str(html)]
    status, _, errors = call(capsys, *words, "--output", str(lines))
    assert status == 0
    assert f"written: {html}" in errors
    text = html.read_text(encoding="utf-8")
    assert text.count('tabindex="0"') == 4 == len(lines.read_text().splitlines())
    assert "threshold 0.4" in text
    search = ["--reward", "letter:s", "--model", "demo", "--set", "n=2", "--set", "iterations=2"]
    assert call(capsys, *words, *search, "--output", str(lines))[0] == 0
    text = html.read_text(encoding="utf-8")
    assert text.count("<svg") == 4
    assert "letter:s" in text
    assert len(lines.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "aisp"], "a trace without --reward does not use --method"),
        (["--reward", "letter:s", "--base", "x"], "--reward does not use --base"),
    ],
)
def test_options_of_the_other_kind(capsys: Any, words: list[str], message: str) -> None:
    status, _, errors = call(capsys, "trace", "Q:", *words)
    assert status == 1
    assert message in errors


def test_pages_of_others_are_kept(capsys: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own page")
    status, _, errors = call(capsys, "trace", "Q:", "--html", str(mine))
    assert status == 1
    assert "kept" in errors
    assert mine.read_text() == "<p>my own page"


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Any, folder: Path, html: str, **options: Any) -> tuple[Any, list[str]]:
    """A page at a phone's width without scripts, and the addresses that it asked for."""
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    size = {"width": 360, "height": 740}
    context = chromium.new_context(viewport=size, has_touch=True, **options)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return page, asked


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG has it."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def colours(locator: Any) -> tuple[str, str]:
    """Text and ground of an element."""
    style = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    text, ground = locator.evaluate(style)
    return text, ground


def colours_of_line(locator: Any) -> tuple[str, str]:
    """Fill and stroke of a line in a picture."""
    fill, stroke = locator.evaluate("e => [getComputedStyle(e).fill, getComputedStyle(e).stroke]")
    return fill, stroke


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_shows_the_tokens(chromium: Any, tmp_path: Path, scheme: str) -> None:
    html = deferral_page(generation(), Tokenizer(), facts={"rule": "threshold 0.4"})
    page, asked = opened(chromium, tmp_path, html, color_scheme=scheme)
    assert asked == [(tmp_path / "page.html").as_uri()]
    # Nothing is wider than the phone, with the tables open too.
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    text, ground = colours(page.locator("body"))
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    assert contrast(text, ground) > 7
    tokens = page.locator(".text .token")
    assert tokens.count() == len(PIECES) + 2
    base, proxy = colours(tokens.nth(0)), colours(tokens.nth(1))
    assert base[1] != proxy[1]
    assert min(contrast(*base), contrast(*proxy)) > 4.5
    # What the model wrote is text.
    assert tokens.nth(1).inner_text().startswith(PIECES[1])
    assert tokens.nth(2).inner_text().startswith("[U+202E]gnp")
    assert tokens.nth(3).inner_text().startswith("␀␛[31m")
    assert tokens.nth(5).inner_text().startswith("&amp;")
    assert [tokens.nth(i).inner_text()[0] for i in (6, 7)] == ["◌", "€"]
    assert page.locator("script").count() == 0


@pytest.mark.parametrize("how", ["hover", "focus", "tap"])
def test_chromium_shows_an_account(chromium: Any, tmp_path: Path, how: str) -> None:
    html = deferral_page(generation(), Tokenizer())
    page, _ = opened(chromium, tmp_path, html, java_script_enabled=False)
    token = page.locator(".text .token").nth(1)
    card = token.locator(".card")
    assert not card.is_visible()
    getattr(token, how)()
    assert card.is_visible()
    assert page.locator(".card:visible").count() == 1
    said = " ".join(card.inner_text().split())
    for part in ("proxy wrote", "p 0.2600", "q 0.5000", "deferred mass 0.1250", "cut 0.0625"):
        assert part in said
    rows = card.locator("tbody tr").all_inner_texts()
    assert rows[0].split() == ["The␣", "0.9000", "0.1000"]
    assert rows[1].split()[-3:] == ["3.0e-07", "–", "yes"]
    box = card.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert box["y"] + box["height"] <= 740


def test_chromium_shows_a_search(chromium: Any, tmp_path: Path) -> None:
    page, asked = opened(chromium, tmp_path, search_page(searched()), color_scheme="dark")
    assert len(asked) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("svg").count() == 4
    titles = page.locator("figcaption").all_inner_texts()
    for name in ("Reward", "Effective sample size", "Norm of u", "Divergence"):
        assert any(title.startswith(name) for title in titles)
    # Three lines of the reward, two of the divergence, a point for each round.
    assert page.locator("polyline").count() == 3 + 1 + 1 + 2
    assert page.locator("circle").count() == 5 * 7
    for line in page.locator("polyline").all():
        fill, stroke = colours_of_line(line)
        assert fill == "none"
        assert contrast(stroke, colours(page.locator("body"))[1]) > 3
    rises = page.locator("svg").nth(2).locator("circle")
    heights = [rises.nth(i).bounding_box()["y"] for i in range(5)]
    assert heights == sorted(heights, reverse=True)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".answers tbody tr").count() == 5
    assert page.locator(".iterations tbody tr").count() == 5

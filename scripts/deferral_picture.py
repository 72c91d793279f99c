"""Draws docs/deferral.svg from a run of the shipped pair: ``python -m scripts.deferral_picture``.

Three greedy answers to one problem: the base's, the proxy's, and that of both by the threshold
rule; and for two tokens of the last, what the base thought at their places.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import torch

import tta_ext

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "deferral.svg"
QUESTION = "Q: Tom has 47 apples. Tom buys 12 more. Tom sells 20. How many apples?"
LIMIT = 0.4
# A probability at which nothing, or everything, is deferred: one model alone.
ALONE = {"base alone": 0.0, "proxy alone": 1.1}

WIDTH, HEIGHT, LEFT, LETTER, BARS, BAR = 820, 314, 130, 9.0, 4, 160.0
SHOWN = {" ": "␣", "\n": "↵", "<eos>": "end"}
STYLE = """
  text { font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
  .note { font: 13px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif }
  .card { fill: #ffffff; stroke: #d0d7de } .ink { fill: #1f2328 } .dim { fill: #656d76 }
  .base { fill: #0b7285 } .proxy { fill: #a2269f } .tail { fill: #c3c9d0 }
  .keep { fill: none; stroke: #0b7285 } .swap { fill: #f8e4f8; stroke: #a2269f }
  .line { stroke: #656d76; fill: none }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #3d444d } .ink { fill: #e6edf3 } .dim { fill: #9198a1 }
    .base { fill: #66d9e8 } .proxy { fill: #f0a6ee } .tail { fill: #4a525c }
    .keep { stroke: #66d9e8 } .swap { fill: #48274a; stroke: #f0a6ee } .line { stroke: #9198a1 }
  }
"""


def text(x: float, y: float, content: str, kind: str, fixed: bool = True, end: bool = False) -> str:
    """A line of text; letters of fixed width take the same room whatever the font."""
    room = f' textLength="{LETTER * len(content):g}"' if fixed else ""
    anchor = ' text-anchor="end"' if end else ""
    place = f'x="{x:g}" y="{y:g}"'
    return (
        f'<text {place} class="{kind}"{room}{anchor} xml:space="preserve">{escape(content)}</text>'
    )


def bars(x: float, y: float, title: str, best: list[tuple[str, float]]) -> list[str]:
    """The likeliest tokens of the base at one place, and the rule's limit."""
    parts = [text(x, y, title, "note ink", fixed=False)]
    for i, (token, p) in enumerate(best):
        top, kind = y + 12 + 20 * i, "base" if p >= LIMIT else "tail"
        size = max(BAR * p, 1.0)
        parts += [
            text(x + 38, top + 13, token, "ink" if p >= LIMIT else "dim", end=True),
            f'<rect x="{x + 48:g}" y="{top + 2:g}" width="{size:.1f}" height="13" class="{kind}"/>',
            text(x + 56 + max(size, BAR * LIMIT), top + 13, f"{p:.2f}", "note dim", fixed=False),
        ]
    limit, bottom = x + 48 + BAR * LIMIT, y + 12 + 20 * len(best)
    parts += [
        f'<path d="M{limit:g} {y + 10:g}V{bottom:g}" class="line" stroke-dasharray="3 3"/>',
        text(limit, bottom + 14, f"p = {LIMIT:g}", "note dim", fixed=False, end=True),
    ]
    return parts


@torch.inference_mode()
def picture() -> str:
    """The drawing as SVG."""
    kad = tta_ext.KnapsackDeferral(*tta_ext.demo_pair(), rule="threshold", param=LIMIT)
    decode = kad.tokenizer.decode
    prompt = f"{QUESTION}\nA:"
    parts = [text(LEFT, 36, QUESTION, "ink")]
    for row, (name, limit) in enumerate(ALONE.items()):
        answer = kad.generate(prompt, param=limit, do_sample=False).text.replace("\n", "↵")
        parts += [
            text(LEFT - 18, 68 + 26 * row, name, "note dim", fixed=False, end=True),
            text(LEFT, 68 + 26 * row, answer.strip(), name.split()[0]),
        ]
    run = kad.generate(prompt, do_sample=False)
    tokens, deferred = run.tokens[0], run.deferred[0]
    x, y, places = float(LEFT), 124.0, []
    parts.append(text(LEFT - 18, y + 18, "both", "note dim", fixed=False, end=True))
    for token, from_proxy in zip(tokens, deferred, strict=True):
        shown = decode([token])
        shown = SHOWN.get(shown, shown.strip())
        wide = LETTER * len(shown) + 10
        source, box = ("proxy", "swap") if from_proxy else ("base", "keep")
        parts += [
            f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="26" rx="4" class="{box}"/>',
            text(x + 5, y + 18, shown, source),
        ]
        places.append(x + wide / 2)
        x += wide + 3

    # The first token that the proxy wrote inside the answer, and the base's one before it.
    swap = next(i for i, flag in enumerate(deferred) if flag and i)
    for left, place, says in (
        (LEFT - 54, swap - 1, f"one token is above {LIMIT:g}: the base's token stays"),
        (LEFT + 310, swap, f"all are below {LIMIT:g}: the proxy writes this token"),
    ):
        seen = torch.tensor([run.prompt_tokens[0] + tokens[:place]])
        p = kad.base(input_ids=seen).logits[0, -1].float().softmax(-1).topk(BARS)
        shown = [decode([token]) for token in p.indices.tolist()]
        best = [(SHOWN.get(s, s.strip()), v) for s, v in zip(shown, p.values.tolist(), strict=True)]
        parts += [
            f'<path d="M{places[place]:g} 150V162H{left + 48:g}V174" class="line"/>',
            *bars(left, 192, says, best),
        ]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            "<title>A deferral: the base's tokens, and those that the proxy wrote</title>",
            f"<style>{STYLE}</style>",
            f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="card"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    OUTPUT.write_text(picture(), encoding="utf-8")

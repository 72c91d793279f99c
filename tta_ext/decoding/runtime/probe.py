"""Does a model compute the same when rows of different length share a batch? Short trials.

Each trial runs two short rows, once together and once alone without a cache, and compares logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.runtime.compat import has_rotary, logits_of, reset_rotary
from tta_ext.decoding.runtime.lockstep import LockstepRunner
from tta_ext.decoding.runtime.models import device_of, embedding_count, logit_count
from tta_ext.decoding.runtime.runner import Runner

__all__ = [
    "draft_difference",
    "lockstep_difference",
    "position_reach",
    "ragged_difference",
    "tolerance",
]


def tolerance(model: Any) -> float:
    """Differences of logits that rounding explains, as a share of the largest."""
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1


def _rows(model: Any) -> list[list[int]]:
    ids = [1 + i % (embedding_count(model) - 1) for i in range(6)]
    return [ids, ids[3:5]]


def _alone(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    device = device_of(model)
    return [logits_of(model, torch.tensor([row], device=device))[0, -1].double() for row in rows]


def _difference(found: Tensor, expected: Iterable[Tensor]) -> float:
    """The largest difference of logits, as a share of the largest logit of its row."""
    worst = 0.0
    for row, alone in zip(found.double(), expected, strict=True):
        scale = float(alone.abs().max().clamp_min(1e-6))
        worst = max(worst, float((row - alone).abs().max()) / scale)
    return worst


@torch.inference_mode()
def ragged_difference(model: Any, contiguous: bool = False) -> float:
    """How much two rows in the ragged cache differ from the same rows alone."""
    rows = _rows(model)
    runner = Runner(model, rows, room=1, vocabulary=logit_count(model), contiguous=contiguous)
    runner.prefill()
    return _difference(runner.step(), _alone(model, rows))


@torch.inference_mode()
def lockstep_difference(model: Any) -> tuple[float, bool]:
    """The same of two rows in lock-step, at their second token.

    Returns:
        The difference, and whether the rows of the model's cache can be picked.
    """
    rows = _rows(model)

    def second(order: Sequence[int]) -> Tensor:
        prompts = [row[:-1] for row in rows]
        runner = LockstepRunner(model, prompts, room=2, vocabulary=logit_count(model))
        runner.step()
        if order != (0, 1):
            runner.keep(order)
        runner.append([rows[i][-1] for i in order])
        return runner.step()

    plain = second((0, 1))
    difference = _difference(plain, _alone(model, rows))
    try:
        picks = _difference(second((1, 0)).flip(0), plain.double()) <= tolerance(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        picks = False
    return difference, picks


@torch.inference_mode()
def draft_difference(model: Any) -> float:
    """How much rows in lock-step differ where a draft is read at once and taken back, in part.

    Infinite if the model reads them all anew for that.
    """
    rows = _rows(model)
    first, second = rows[0][0], rows[0][4]

    def runner() -> LockstepRunner:
        prompts = [row[:-1] for row in rows]
        made = LockstepRunner(model, prompts, room=4, vocabulary=logit_count(model))
        made.step()
        made.append([row[-1] for row in rows])
        return made

    plain, drafts = runner(), runner()
    plain.step()
    expected: list[Tensor] = []
    for token in (first, second):
        plain.append([token] * len(rows))
        expected += plain.step().double()
    before, kept = drafts.tokens_run, [length + 1 for length in drafts.lengths]
    scored = drafts.score([[first, first, second]] * len(rows))
    drafts.rollback(kept, [[second]] * len(rows))
    found = torch.cat((scored[:, 1], drafts.step()))
    fed = (drafts.tokens_run - before) // len(rows)
    return _difference(found, expected) if fed == 5 else float("inf")


@torch.inference_mode()
def position_reach(model: Any) -> int | None:
    """Up to how many tokens a row does not disturb a short one by its length alone.

    Rotary factors may follow the largest position of the batch. A short row is run beside the same
    tokens at far positions; if its logits change, the nearest such position is searched for.

    Returns:
        None if no length disturbs.
    """
    row = _rows(model)[0]
    device, last = device_of(model), len(row) - 1
    columns = torch.arange(len(row), device=device)
    limit = model.config.get_text_config().max_position_embeddings

    def short(offset: int, other: Sequence[int] = row) -> Tensor:
        """The first row's last logits, beside another row that begins at a position."""
        reset_rotary(model)
        tokens = torch.tensor([row, list(other)], device=device)
        position = torch.stack((columns, columns + offset))
        return logits_of(model, tokens, position_ids=position)[:1, -1]

    near = [short(0)[0].double()]
    # Other tokens at the same positions: what neighbours change by rounding alone, as experts do.
    noise = _difference(short(0, row[::-1]), near)

    def disturbs(end: int) -> bool:
        return _difference(short(end - last), near) > 4.0 * noise + 1e-6

    # Only rotary embeddings go beyond the limit, and only beyond it do some of them change.
    low, high = last, 2 * limit if has_rotary(model) else limit - 1
    if high <= low or not disturbs(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if disturbs(middle) else (middle, high)
    reset_rotary(model)
    return high

"""implicit_reward_probs and implicit_reward_sample with two experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tta_ext import ops
from tta_ext.backends import reference

from . import checks, eager
from .data import language_model_logits
from .grid import Grid, compiled
from .harness import Case

EXPERTS = 2


def cases(grid: Grid) -> Iterator[Case]:
    """All cases of the implicit-reward operators."""
    for dtype, batch, vocab in grid.shapes():
        yield from _pair(grid, dtype, batch, vocab)


def _pair(grid: Grid, dtype: torch.dtype, batch: int, vocab: int) -> Iterator[Case]:
    base = language_model_logits(batch, vocab, grid.seed, dtype)
    generator = torch.Generator().manual_seed(grid.seed + 1)
    expert = base + torch.randn(EXPERTS, batch, vocab, generator=generator).to(dtype)
    anti = base + torch.randn(EXPERTS, batch, vocab, generator=generator).to(dtype)
    beta = torch.tensor([0.7, 0.4])
    seed = torch.tensor(grid.seed, dtype=torch.int64)
    index = torch.arange(batch, dtype=torch.int64)
    keys: dict[str, Any] = {"seed": seed, "position": index, "sequence": index}
    raw_keys = (seed, index, index, 0, torch.tensor(0), True)
    rows = checks.rows_to_check(batch, vocab)
    part = (base[rows], expert[:, rows], anti[:, rows], beta, 1.0)
    want = reference.implicit_reward_probs(*part, True, compute_dtype=torch.float64)
    token = reference.implicit_reward_sample(
        *part,
        seed,
        index[rows],
        index[rows],
        0,
        torch.tensor(0),
        True,
        True,
        compute_dtype=torch.float64,
    )
    probs_out = ops.implicit_reward_probs(base, expert, anti, beta)
    token_out = ops.implicit_reward_sample(base, expert, anti, beta, **keys)
    reads = (1 + 2 * EXPERTS) * vocab * base.element_size()
    shape = (dtype, batch, vocab)

    def softmax() -> Any:
        return torch.softmax(base, -1)

    yield Case(
        "implicit_reward_probs",
        f"{EXPERTS} experts",
        *shape,
        batch * (reads + 4 * vocab),
        "V ((1 + 2 E) s + 4)",
        grid.select(
            base.numel(),
            eager=lambda: eager.implicit_reward_probs(base, expert, anti, beta),
            compiled=lambda: compiled(eager.implicit_reward_probs)(base, expert, anti, beta),
            reference=lambda: reference.implicit_reward_probs(base, expert, anti, beta, 1.0, True),
            ours=lambda: ops.implicit_reward_probs(base, expert, anti, beta, out=probs_out),
        ),
        lambda name, got: checks.distribution(name, got[rows], want),
        softmax,
    )
    yield Case(
        "implicit_reward_sample",
        f"{EXPERTS} experts",
        *shape,
        batch * reads,
        "V (1 + 2 E) s",
        grid.select(
            base.numel(),
            eager=lambda: eager.implicit_reward_sample(base, expert, anti, beta),
            compiled=lambda: compiled(eager.implicit_reward_sample)(base, expert, anti, beta),
            reference=lambda: reference.implicit_reward_sample(
                base, expert, anti, beta, 1.0, *raw_keys, True
            ),
            ours=lambda: ops.implicit_reward_sample(
                base, expert, anti, beta, **keys, out=token_out
            ),
        ),
        lambda name, got: checks.tokens(name, got[rows], token, want),
        softmax,
    )

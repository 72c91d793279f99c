"""deferral_verify on drafts that are accepted whole, the case in which it reads the most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops, rng, rules
from tta_ext.backends import reference as _reference

from . import checks, eager
from .data import language_model_logits
from .grid import PARAMS, Grid, compiled
from .harness import Case

reference: Any = _reference

DRAFT = 8
# Standard deviation of the proxy's own noise: near enough to the base to be accepted often.
PROXY_NOISE = 0.3


@dataclass
class Inputs:
    """Logits of base ``[B, K+1, V]`` and proxy ``[B, K, V]``, and drafts accepted whole."""

    base: Tensor
    proxy: Tensor
    draft: Tensor
    length: Tensor
    keys: dict[str, Any]
    rule: str
    param: float

    @property
    def public(self) -> dict[str, Any]:
        return {"rule": self.rule, "param": self.param, "return_mass": False, **self.keys}

    @property
    def raw(self) -> tuple[Any, ...]:
        k = self.keys
        param = torch.tensor(self.param, dtype=torch.float64)
        rule = (param, rules.rule_code(self.rule), rules.EXCLUDE, 1.0, 1.0)
        key = (k["seed"], k["position"], k["sequence"], 0, torch.tensor(0), True)
        return (self.base, self.proxy, self.draft, self.length, *rule, *key, False, True)

    @property
    def rows_reached(self) -> int:
        return self.base.shape[1] + self.proxy.shape[1]


def make(
    batch: int,
    vocab: int,
    dtype: torch.dtype,
    seed: int,
    rule: str = "knapsack",
    draft: int = DRAFT,
) -> Inputs:
    """Draw drafts from the proxy until all rows accept theirs whole and keep the bonus token.

    Row by row the sequence id is counted up, so that the inputs are the same on every machine.
    """
    base = language_model_logits(batch * (draft + 1), vocab, seed, torch.float32)
    base = base.view(batch, draft + 1, vocab)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    noise = PROXY_NOISE * torch.randn(batch, draft, vocab, generator=generator)
    proxy = (base[:, :draft] + noise).to(dtype)
    base = base.to(dtype)
    seed_tensor = torch.tensor(seed, dtype=torch.int64)
    length = torch.full((1,), draft, dtype=torch.int64)
    drafts, ids = [], []
    for row in range(batch):
        for sequence in range(10_000):
            key: dict[str, Any] = {
                "seed": seed_tensor,
                "sequence": torch.full((1,), sequence, dtype=torch.int64),
            }
            tokens = torch.stack(
                [
                    ops.categorical_sample(
                        proxy[row : row + 1, k],
                        **key,
                        position=torch.full((1,), k, dtype=torch.int64),
                        stream=rng.DRAFT,
                    )
                    for k in range(draft)
                ],
                -1,
            )
            got = ops.deferral_verify(
                base[row : row + 1],
                proxy[row : row + 1],
                tokens,
                length,
                rule=rule,
                param=PARAMS[rule],
                **key,
                position=torch.zeros(1, dtype=torch.int64),
            )
            if int(got.accepted) == draft and not bool(got.deferred):
                drafts.append(tokens[0])
                ids.append(sequence)
                break
        else:
            raise RuntimeError(f"no draft of row {row} was accepted whole in 10000 tries")
    keys = {
        "seed": seed_tensor,
        "position": torch.zeros(batch, dtype=torch.int64),
        "sequence": torch.tensor(ids, dtype=torch.int64),
    }
    lengths = length.expand(batch).contiguous()
    return Inputs(base, proxy, torch.stack(drafts), lengths, keys, rule, PARAMS[rule])


def softmaxes(i: Inputs) -> tuple[Tensor, Tensor]:
    """The yardstick: a softmax of every row that is reached."""
    return torch.softmax(i.base, -1), torch.softmax(i.proxy, -1)


def cases(grid: Grid) -> Iterator[Case]:
    """Drafts of eight tokens; batches above 4 only make the logits larger."""
    for dtype, batch, vocab in grid.shapes():
        if batch <= 4:
            yield case(grid, make(batch, vocab, dtype, grid.seed))


def case(grid: Grid, i: Inputs) -> Case:
    batch, positions, vocab = i.base.shape
    want = reference.deferral_verify(*i.raw, compute_dtype=torch.float64)
    out = ops.deferral_verify(i.base, i.proxy, i.draft, i.length, **i.public)

    def check(name: str, got: Any) -> str:
        if name in checks.TIGHT:
            return checks.equal(got[0], want[0]) or checks.equal(got[1], want[1])
        inside = bool(((got[0] >= 0) & (got[0] < positions)).all())
        return "" if inside and bool((got[1] >= 0).all()) else "accepted or token out of range"

    return Case(
        "deferral_verify",
        f"{i.rule}, K={positions - 1}",
        i.base.dtype,
        batch,
        vocab,
        batch * i.rows_reached * vocab * i.base.element_size(),
        "(2 K + 1) V s",
        grid.select(
            i.base.numel(),
            eager=lambda: eager.deferral_verify(i.base, i.proxy, i.draft, i.rule, i.param),
            compiled=lambda: compiled(eager.deferral_verify)(
                i.base, i.proxy, i.draft, i.rule, i.param
            ),
            reference=lambda: reference.deferral_verify(*i.raw),
            ours=lambda: ops.deferral_verify(
                i.base, i.proxy, i.draft, i.length, **i.public, out=out
            ),
        ),
        check,
        lambda: softmaxes(i),
    )

"""deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops, rules
from tta_ext.backends import reference as _reference

from . import checks, eager
from .data import language_model_pair
from .grid import PARAMS, Grid, compiled
from .harness import Case

# The functions take many positional arguments that stand in tuples of ours.
reference: Any = _reference


class _Inputs:
    """Logits, keys and the float64 answers of one dtype, shape and rule."""

    def __init__(self, dtype: torch.dtype, batch: int, vocab: int, rule: str, seed: int) -> None:
        self.base, self.proxy = language_model_pair(batch, vocab, seed, dtype)
        self.dtype, self.batch, self.vocab, self.rule = dtype, batch, vocab, rule
        self.param = PARAMS[rule]
        self.seed = torch.tensor(seed, dtype=torch.int64)
        self.position = torch.arange(batch, dtype=torch.int64)
        self.sequence = torch.arange(batch, dtype=torch.int64)
        self.itemsize = self.base.element_size()
        self.needs_proxy = rules.rule_code(rule) in rules.NEEDS_PROXY
        # Rows that are compared with float64.
        self.rows = checks.rows_to_check(batch, vocab)

    @property
    def public(self) -> dict[str, Any]:
        return {"rule": self.rule, "param": self.param}

    @property
    def keys(self) -> dict[str, Any]:
        return {"seed": self.seed, "position": self.position, "sequence": self.sequence}

    @property
    def raw(self) -> Any:
        param = torch.tensor(self.param, dtype=torch.float64)
        return (param, rules.rule_code(self.rule), rules.EXCLUDE, 1.0, 1.0)

    def raw_keys(self, rows: Tensor | None = None) -> Any:
        rows = torch.arange(self.batch) if rows is None else rows
        return (self.seed, self.position[rows], self.sequence[rows], 0, torch.tensor(0), True)

    def oracle(self, name: str, *, proxy: bool = True, keys: bool = False) -> Any:
        """The float64 reference on the rows that are checked."""
        logits = [self.base[self.rows], *([self.proxy[self.rows]] if proxy else [])]
        more: Any = self.raw_keys(self.rows) if keys else ()
        return getattr(reference, name)(
            *logits, *self.raw, *more, True, compute_dtype=torch.float64
        )

    def case(self, op: str, formula: str, size: int, providers: dict, check: Any) -> Case:
        return Case(
            op,
            self.rule,
            self.dtype,
            self.batch,
            self.vocab,
            size * self.batch,
            formula,
            providers,
            check,
            lambda: torch.softmax(self.base, -1),
        )


def _mask(i: _Inputs, grid: Grid) -> Case:
    out = ops.deferral_mask(i.base, i.proxy, **i.public)
    want = i.oracle("deferral_mask")[0]
    p = torch.softmax(i.base[i.rows].double(), -1)
    providers = grid.select(
        i.base.numel(),
        eager=lambda: eager.deferral_mask(i.base, i.proxy, i.rule, i.param),
        compiled=lambda: compiled(eager.deferral_mask)(i.base, i.proxy, i.rule, i.param),
        reference=lambda: reference.deferral_mask(i.base, i.proxy, *i.raw, True)[0],
        ours=lambda: ops.deferral_mask(i.base, i.proxy, **i.public, out=out)[0],
    )
    reads = 2 if i.needs_proxy else 1
    return i.case(
        "deferral_mask",
        f"V ({reads} s + 1)",
        i.vocab * (reads * i.itemsize + 1),
        providers,
        lambda name, got: checks.mask(name, got[i.rows], want, p),
    )


def _probs(i: _Inputs, grid: Grid) -> Case:
    out = ops.deferral_probs(i.base, i.proxy, **i.public)
    want = i.oracle("deferral_probs")
    providers = grid.select(
        i.base.numel(),
        eager=lambda: eager.deferral_probs(i.base, i.proxy, i.rule, i.param),
        compiled=lambda: compiled(eager.deferral_probs)(i.base, i.proxy, i.rule, i.param),
        reference=lambda: reference.deferral_probs(i.base, i.proxy, *i.raw, True),
        ours=lambda: ops.deferral_probs(i.base, i.proxy, **i.public, out=out),
    )
    return i.case(
        "deferral_probs",
        "V (2 s + 4)",
        i.vocab * (2 * i.itemsize + 4),
        providers,
        lambda name, got: checks.distribution(name, got[i.rows], want),
    )


def _stats(i: _Inputs, grid: Grid) -> Case:
    out = ops.deferral_stats(i.base, i.proxy, **i.public)
    want = i.oracle("deferral_stats")[0]
    providers = grid.select(
        i.base.numel(),
        eager=lambda: eager.deferral_stats(i.base, i.proxy, i.rule, i.param),
        compiled=lambda: compiled(eager.deferral_stats)(i.base, i.proxy, i.rule, i.param),
        reference=lambda: reference.deferral_stats(i.base, i.proxy, *i.raw, True)[0],
        ours=lambda: ops.deferral_stats(i.base, i.proxy, **i.public, out=out)[0],
    )
    reads = 2 if i.needs_proxy else 1
    return i.case(
        "deferral_stats",
        f"{reads} V s",
        i.vocab * reads * i.itemsize,
        providers,
        lambda name, got: checks.values(name, got[i.rows], want),
    )


def _propose(i: _Inputs, grid: Grid) -> Case:
    out = ops.deferral_propose(i.base, **i.public, **i.keys)
    token, deferred = i.oracle("deferral_propose", proxy=False, keys=True)
    p = torch.softmax(i.base[i.rows].double(), -1)
    masks = i.oracle("deferral_mask")[0]

    def check(name: str, got: Any) -> str:
        tokens, flags = got[0][i.rows], got[1][i.rows]
        wrong = checks.tokens(name, tokens, token, p)
        if not wrong and name in checks.TIGHT:
            wrong = checks.equal(flags, deferred)
        return wrong or checks.mask(
            name, flags[:, None], masks.gather(-1, tokens[:, None]), p.gather(-1, tokens[:, None])
        )

    providers = grid.select(
        i.base.numel(),
        eager=lambda: eager.deferral_propose(i.base, i.rule, i.param),
        compiled=lambda: compiled(eager.deferral_propose)(i.base, i.rule, i.param),
        reference=lambda: reference.deferral_propose(i.base, *i.raw, *i.raw_keys(), True),
        ours=lambda: ops.deferral_propose(i.base, **i.public, **i.keys, out=out),
    )
    return i.case("deferral_propose", "V s", i.vocab * i.itemsize, providers, check)


def _sample(i: _Inputs, grid: Grid) -> Case:
    out = ops.deferral_sample(i.base, i.proxy, **i.public, **i.keys)
    want = i.oracle("deferral_sample", keys=True)[0]
    probs = i.oracle("deferral_probs")
    # The proxy's row is read where the base's draw was rejected, or by the rule itself.
    proxies = i.batch if i.needs_proxy else int(out[1].sum())
    case_bytes = (i.batch + proxies) * i.vocab * i.itemsize
    providers = grid.select(
        i.base.numel(),
        eager=lambda: eager.deferral_sample(i.base, i.proxy, i.rule, i.param),
        compiled=lambda: compiled(eager.deferral_sample)(i.base, i.proxy, i.rule, i.param),
        reference=lambda: reference.deferral_sample(i.base, i.proxy, *i.raw, *i.raw_keys(), True)[
            0
        ],
        ours=lambda: ops.deferral_sample(i.base, i.proxy, **i.public, **i.keys, out=out)[0],
    )
    return i.case(
        "deferral_sample",
        "V s (rows + rows whose draw is deferred)",
        case_bytes // i.batch,
        providers,
        lambda name, got: checks.tokens(name, got[i.rows], want, probs),
    )


def cases(grid: Grid) -> Iterator[Case]:
    """All cases of the deferral operators."""
    for dtype, batch, vocab in grid.shapes():
        for rule in grid.rules:
            i = _Inputs(dtype, batch, vocab, rule, grid.seed)
            yield _mask(i, grid)
            yield _probs(i, grid)
            yield _stats(i, grid)
            if not i.needs_proxy:
                yield _propose(i, grid)
            yield _sample(i, grid)

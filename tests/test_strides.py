"""Small arguments of any stride give the bits of contiguous ones; outputs stay contiguous."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import operator_arguments, operator_outputs
from torch import Tensor

from tta_ext import ops, rules
from tta_ext.schemas import OPS

# What needs a unit stride over its last dimension; all other tensors are small arguments.
LARGE = frozenset(
    "base_logits proxy_logits expert_logits anti_logits logits hidden profit weight".split()
)
# In place of the single values of operator_arguments.
BY_ROW: dict[str, Tensor] = {
    "param": torch.tensor([0.3, 0.7, 0.1], dtype=torch.float64),
    "capacity": torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64),
}
BY_POSITION = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _sliced(x: Tensor) -> Tensor:
    """Every third element of a wider storage, from the second one on."""
    wide = x.new_full((*x.shape, 3), 7 if x.dtype is torch.int64 else torch.nan)
    wide[..., 1] = x
    return wide[..., 1]


LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "sliced": (0, _sliced),
    "expanded": (1, lambda x: x[-1:].expand(x.shape)),
    "expanded over columns": (2, lambda x: x[..., -1:].expand(x.shape)),
    "transposed": (2, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)),
}


def _names(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.tta_ext, op).default._schema.arguments]


def _arguments(op: str) -> dict[str, Any]:
    given = dict(zip(_names(op), operator_arguments(op), strict=True))
    return given | {name: value for name, value in BY_ROW.items() if name in given}


def _cases() -> Iterator[tuple[str, str, str, Tensor]]:
    for op in OPS:
        given = _arguments(op)
        values = [(k, v) for k, v in given.items() if isinstance(v, Tensor) and k not in LARGE]
        if op == "deferral_verify":
            values.append(("param", BY_POSITION))
        for name, value in values:
            for layout, (dims, _) in LAYOUTS.items():
                if value.dim() >= dims:
                    yield op, name, layout, value


cases = pytest.mark.parametrize(
    ("op", "name", "layout", "value"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}{list(case[3].shape)}-{case[2]}")
     for case in _cases()],
)  # fmt: skip


def _pair(op: str, name: str, layout: str, value: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments with the tensor laid out, and with a contiguous copy of the same values."""
    laid = LAYOUTS[layout][1](value)
    if laid.numel() > 1:
        assert not laid.is_contiguous()
    given = _arguments(op)
    return given | {name: laid}, given | {name: laid.contiguous().clone()}


def _same(got: Any, want: Any) -> None:
    as_tuple = [(x,) if isinstance(x, Tensor) else x for x in (got, want)]
    for one, other in zip(*as_tuple, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()


def _public(op: str, given: dict[str, Any]) -> Any:
    """The public function on the arguments of its operator."""
    given = dict(given)
    if "rule" in given:
        given["rule"] = rules.RULE_NAMES[given["rule"]]
        given["critical"] = list(rules.CRITICAL)[given["critical"]]
    for name in ("start", "stop", "partial"):
        given.pop(name, None)
    return getattr(ops, op)(**given)


@cases
def test_public_operators(backend: str, op: str, name: str, layout: str, value: Tensor) -> None:
    laid, plain = _pair(op, name, layout, value)
    _same(_public(op, laid), _public(op, plain))


@cases
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.requires_cuda)])
def test_raw_operators(
    native: None, device: str, op: str, name: str, layout: str, value: Tensor
) -> None:
    laid, plain = (
        {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        for given in _pair(op, name, layout, value)
    )
    laid[name] = LAYOUTS[layout][1](value.to(device))
    packet = getattr(torch.ops.tta_ext, op)
    want = packet(*plain.values())
    _same(packet(*laid.values()), want)
    outputs = operator_outputs(op, tuple(laid.values()))
    packet.out(*laid.values(), **outputs)
    _same(tuple(outputs.values()), want if isinstance(want, tuple) else (want,))


COLUMNS = "param position sequence rollout step row capacity draft_length".split()


@pytest.mark.parametrize("op", OPS)
def test_a_column_is_one_a_row(backend: str, op: str) -> None:
    given = _arguments(op)
    want = _public(op, given)
    columns = [n for n in COLUMNS if isinstance(given.get(n), Tensor) and given[n].dim() == 1]
    for name in columns:
        _same(_public(op, given | {name: given[name].unsqueeze(1)}), want)
        wide = given[name].new_zeros(given[name].numel(), 2)
        wide[:, 1] = given[name]
        _same(_public(op, given | {name: wide[:, 1:]}), want)


def test_compiled(native: None) -> None:
    torch._dynamo.reset()

    def run(logits: Tensor, norm2: Tensor, position: Tensor, param: Tensor) -> Any:
        n = logits.shape[0]
        weights = ops.importance_weights(
            logits[:, :n], logits[:, :n].t(), norm2[:, None].expand(n, n), lam=1.0, alpha=0.5,
            sigma=0.7,
        )  # fmt: skip
        drawn = ops.deferral_sample(
            logits, logits.flip(1), rule="threshold", param=param[:, 1], seed=5,
            position=position[::2], sequence=position[:1].expand(n),
        )  # fmt: skip
        return *weights, *drawn

    arguments = (
        torch.randn(3, 40),
        torch.rand(3),
        torch.arange(6),
        torch.rand(3, 4, dtype=torch.float64),
    )
    _same(torch.compile(run, fullgraph=True)(*arguments), run(*arguments))


def test_outputs_stay_contiguous(native: None) -> None:
    """One place written for several rows is refused, whoever asks."""
    arguments = operator_arguments("categorical_sample")
    once = torch.zeros(1, dtype=torch.int64).expand(3)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        torch.ops.tta_ext.categorical_sample.out(*arguments, out=once)
    with pytest.raises(ValueError, match="out is not contiguous, expected a contiguous tensor"):
        ops.categorical_sample(arguments[0], seed=1, position=0, out=once)
    hidden, mean = torch.zeros(3, 4), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="dot is not contiguous, expected a contiguous tensor"):
        ops.prelogit_perturb(
            hidden, mean, step=0, row=0, sequence=0, rollout=0, iteration=0, sigma=1.0, seed=1,
            dot=torch.zeros(1).expand(3),
        )  # fmt: skip

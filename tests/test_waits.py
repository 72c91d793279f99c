"""How often the host waits for the device, counted where it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tta_ext import KnapsackDeferral, ops
from tta_ext.decoding.deferral.step import _index, deferral_step
from tta_ext.rules import Rule


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would make the host wait, were the tensors on a device."""
    found: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(Tensor, name)

        def run(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return real(self, *args, **kwargs)

        return run

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, noted(name))
    monkeypatch.setattr(Tensor, "is_cpu", False)
    return found


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(
    ("name", "param", "lazy", "expected"),
    [
        ("threshold", 0.0, True, 1),
        ("threshold", 1.1, True, 2),
        ("knapsack", 0.5, True, 2),
        ("threshold", 0.5, False, 1),
        ("confidence_bet", 0.1, False, 1),
    ],
)
def test_a_step_waits_once_and_again_for_a_lazy_proxy(
    native: None, waits: list[str], name: str, param: float, lazy: bool, expected: int,
    do_sample: bool,
) -> None:  # fmt: skip
    base, proxy = 3 * torch.randn(2, 16, 50, generator=torch.Generator().manual_seed(3))
    keys: dict[str, Any] = {"position": torch.arange(16), "sequence": torch.arange(16)}

    def ask(rows: list[int] | None, index: Tensor | None) -> Tensor:
        return proxy if index is None else proxy[index]

    rule = Rule(name, param)
    ops.deferral_sample(base, proxy, rule=rule, seed=4, check=False, **keys)
    waits.clear()
    deferral_step(base, ask if lazy else proxy, rule, seed=4, do_sample=do_sample, **keys)
    assert waits == ["tolist"] * expected


@pytest.mark.parametrize(
    "options", [{"rule": "threshold", "param": 0.4}, {"rule": "confidence_bet", "param": 0.1}]
)
def test_decoding_waits_no_more_than_its_steps(
    waits: list[str], kad: KnapsackDeferral, options: dict[str, Any]
) -> None:
    found = []
    for new in (8, 24):
        waits.clear()
        out = kad.generate(
            [[5, 6, 7], [8, 9]], seed=2, max_new_tokens=new, eos_token_id=[], **options
        )
        replaced = sum(map(any, zip(*out.deferred, strict=True))) if "0.4" in str(options) else 0
        found.append((len(waits), out.stats.steps + replaced))
    (few, least), (many, most) = found
    assert many - few == most - least, found


def test_rows_go_to_a_gpu_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of pinned memory, from which alone CUDA copies while the host goes on."""
    found: list[Any] = []

    def noted(name: str) -> Any:
        def run(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found.append((name, *args, kwargs))
            return self

        return run

    for name in ("pin_memory", "to"):
        monkeypatch.setattr(Tensor, name, noted(name))
    device = torch.device("cuda")
    assert _index([3, 5], device).equal(torch.tensor([3, 5]))
    assert found == [("pin_memory", {}), ("to", device, {"non_blocking": True})]

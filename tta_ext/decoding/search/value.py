"""A value function: the reward that an answer begun will have, from the model's pre-logits.

RE-Control (arXiv:2406.05954) trains one on answers that the model itself has drawn and moves the
pre-logits up its slope (:mod:`re_control`); controlled decoding (arXiv:2310.17022) chooses among a
step's likely tokens by it (``value=`` of :mod:`reward_guided`). Both need the reward for training,
and while they decode only for the finished answers.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tta_ext import rng
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.runtime.models import device_of, head_inputs
from tta_ext.decoding.search.best_of_n import BestOfN
from tta_ext.decoding.search.checkpoint import write_tensors
from tta_ext.decoding.search.engine import LocalEngine, RolloutTask
from tta_ext.decoding.search.rollouts import PromptCache, Rollouts

__all__ = ["MARK", "ValueHead", "load_value", "train_value", "value_for"]

_KEY = "tta_ext.value"
# How a file of one begins: the size of its head, and the head.
MARK = re.compile(rb'(?s).{8}\{"__metadata__":\{"' + re.escape(_KEY.encode()) + rb'"')


class ValueHead(nn.Module):
    """``V(h) = mean + deviation (b + a . tanh(B (h - centre) / scale + c))``, in the reward's unit.

    Args:
        dimensions: d, size of the pre-logits.
        width: hidden units.
        seed: of the first weights.

    Attributes:
        centre, scale: mean of the training pre-logits ``[d]``, and their root mean square about it.
        mean, deviation: of the training rewards.
        facts: what it was trained on, for JSON: ``samples`` answers of ``tokens`` tokens to
            ``prompts`` prompts, ``seconds``; ``held_out_error`` and ``held_out_variance``, the mean
            square errors of V and of the training mean on prompts that it has not seen.
    """

    centre: Tensor
    scale: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, dimensions: int, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner, self.outer = nn.Linear(dimensions, width), nn.Linear(width, 1)
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
        self.register_buffer("centre", torch.zeros(dimensions))
        for name, value in (("scale", 1.0), ("mean", 0.0), ("deviation", 1.0)):
            self.register_buffer(name, torch.tensor(value))
        self.facts: dict[str, Any] = {}

    @property
    def samples(self) -> int:
        """Answers that were drawn and scored to train it."""
        return int(self.facts.get("samples", 0))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values ``[...]`` of pre-logits ``[..., d]``, float32."""
        return self.mean + self.deviation * self._standard(hidden)

    def _inside(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.inner((hidden.float() - self.centre) / self.scale))

    def _standard(self, hidden: Tensor) -> Tensor:
        value: Tensor = self.outer(self._inside(hidden))
        return value.squeeze(-1)

    def gradient(self, hidden: Tensor) -> Tensor:
        """The slope of the value at pre-logits ``[..., d]``, the same shape, float32."""
        inside = self._inside(hidden)
        slope = (self.outer.weight[0] * (1.0 - inside.square())) @ self.inner.weight
        return slope * (self.deviation / self.scale)

    def ascend(self, hidden: Tensor, steps: int, step_size: float) -> Tensor:
        """Pre-logits after gradient steps on the value.

        Args:
            hidden: ``[..., d]``.
            steps: number of steps.
            step_size: of each, in units of the training data: pre-logits move by ``step_size``
                times their scale where the value rises by one deviation over one scale.
        """
        if not steps or not step_size:
            return hidden
        moved, unit = hidden.float(), step_size * self.scale.square() / self.deviation
        for _ in range(steps):
            moved = moved + unit * self.gradient(moved)
        return moved.to(hidden.dtype)

    def save(self, path: str | Path) -> None:
        """Write weights and facts to a safetensors file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        facts = {_KEY: json.dumps(self.facts)}
        write_tensors(Path(path), self.state_dict(), facts, "the value function")


def load_value(path: str | Path, dimensions: int | None = None) -> ValueHead:
    """A value function from a file of :meth:`ValueHead.save`.

    Raises:
        ValueError: not such a file, or one for pre-logits of another size than ``dimensions``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        width, size = tensors["inner.weight"].shape
        head = ValueHead(size, width)
        head.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no value function ({error})") from error
    if dimensions is not None and size != dimensions:
        raise ValueError(
            f"{path} is for pre-logits of {size} numbers, this model's have {dimensions}; "
            "train one with tta value"
        )
    head.facts = facts
    return head.requires_grad_(False)


def value_for(path: str, model: Any) -> ValueHead:
    """The value function in a file, where a model's head is."""
    return load_value(path, head_inputs(model)).to(device_of(model))


class _Noted(Rollouts):
    """Rollouts that keep a copy of their pre-logits, by prompt, iteration and rollout."""

    def __init__(
        self, notes: dict[Any, list[Tensor]], prompts: PromptCache, cells: Any, **options: Any
    ) -> None:
        super().__init__(prompts, cells, **options)
        self.notes = notes

    def changed(self, hidden: Tensor) -> Tensor:
        for row, cell in enumerate(self.rows.active):
            prompt, rollout = self.cells[cell]
            key = self.prompts.first + prompt, self.iteration, rollout
            self.notes[key].append(hidden[row].to("cpu", torch.float32, copy=True))
        return hidden


def train_value(
    model: Any,
    reward: Reward,
    prompts: Sequence[Any],
    tokenizer: Any = None,
    *,
    n: int = 16,
    width: int = 64,
    epochs: int = 30,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    held_out: float = 0.2,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> ValueHead:
    """Train a value function on answers that the model draws, and their rewards.

    At every token of an answer V is regressed on the whole answer's reward, by AdamW on the mean
    square. The epoch is kept that does best on the held-out prompts.

    Args:
        model, reward, tokenizer: as for :class:`~tta_ext.decoding.search.base.SearchMethod`.
        prompts: at least two.
        n: answers to each.
        width: hidden units of V.
        epochs, learning_rate, weight_decay: of the training.
        held_out: share of the prompts that are kept from it, at least one.
        seed: of answers, split, first weights and order.
        progress: called with the number of prompts answered.
        settings: how answers are drawn: fields of
            :class:`~tta_ext.decoding.search.settings.SearchSettings`.

    Raises:
        ValueError: fewer than two prompts, a number out of range, or rewards that are all equal or
            not finite.
    """
    if len(prompts) < 2:
        raise ValueError(f"there are {len(prompts)} prompts, expected at least 2: one is held out")
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is {held_out!r}, expected 0 < held_out < 1")
    begin = perf_counter()
    notes: dict[Any, list[Tensor]] = defaultdict(list)

    def engine(model: Any, task: RolloutTask) -> LocalEngine:
        return LocalEngine(model, task, partial(_Noted, notes))

    method = BestOfN(model, reward, tokenizer, engine=engine, n=n, **settings)
    result = method.generate(prompts, seed=seed, progress=progress)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    kept_back = set(order[: min(max(round(held_out * len(prompts)), 1), len(prompts) - 1)])
    parts: dict[bool, tuple[list[Tensor], list[float]]] = {True: ([], []), False: ([], [])}
    for prompt, candidates in enumerate(result.candidates):
        hidden, target = parts[prompt in kept_back]
        for one in candidates:
            if math.isfinite(one.reward):
                rows = notes[prompt, one.iteration, one.rollout]
                hidden += rows
                target += [one.reward] * len(rows)
    if not parts[True][0] or not parts[False][0]:
        raise ValueError("no finite reward among the training or the held-out prompts")
    # In float64, so that the number of threads, which orders sums, decides no digit that is kept.
    (x, y), seen = (
        (torch.stack(hidden).double(), torch.tensor(target, dtype=torch.float64))
        for hidden, target in (parts[False], parts[True])
    )
    head = ValueHead(head_inputs(method.model), width, seed).double()
    head.centre, head.mean = x.mean(0), y.mean()
    head.scale = (x - head.centre).square().mean().sqrt()
    head.deviation = y.std(correction=0)
    if not head.deviation > 0.0:
        raise ValueError(f"the rewards are all {float(y[0])}; there is nothing to learn from them")
    error = _fit(head, x, y, seen, epochs, learning_rate, weight_decay, seed)
    head.facts = {
        "samples": sum(result.samples),
        "tokens": result.timing.tokens,
        "prompts": len(prompts),
        "seconds": perf_counter() - begin,
        "held_out_error": error,
        "held_out_variance": float((seen[1] - head.mean).square().mean()),
        "seed": rng.resolve_seed(seed),
    }
    return head.float().requires_grad_(False)


def _fit(
    head: ValueHead,
    x: Tensor,
    y: Tensor,
    seen: tuple[Tensor, Tensor],
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> float:
    """Train in place; the mean square error on ``seen`` of the epoch that is kept."""
    generator = torch.Generator().manual_seed(seed + 1)
    wanted = (y - head.mean) / head.deviation
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    best, state = math.inf, {}
    for epoch in range(epochs + 1):
        if epoch:
            for part in torch.randperm(len(x), generator=generator).split(256):
                loss = (head._standard(x[part]) - wanted[part]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            error = float((head(seen[0]) - seen[1]).square().mean())
        if error < best:
            best = error
            state = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(state)
    return best

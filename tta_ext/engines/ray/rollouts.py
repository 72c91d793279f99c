"""Rollouts of a search drawn and scored by Ray workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.decoding.runtime.models import device_of, head_inputs
from tta_ext.decoding.search.engine import (
    METERS,
    LocalEngine,
    OnFinish,
    RolloutBatch,
    RolloutEngine,
    RolloutJob,
    RolloutTask,
    Scores,
)
from tta_ext.engines.ray.workers import Workers, connect

__all__ = ["Rollouts"]


def _elsewhere(prompts: list[Any], responses: list[Any]) -> list[float]:
    """In place of the reward in what is sent to workers, who have it."""
    raise RuntimeError("this reward is in the workers")


class _Roller:
    """In a worker: the model and the reward, and the engine of the search at hand."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]) -> None:
        self.model, self.reward = load()
        self.name: int | None = None

    def roll(
        self, name: int, boxed: list[Any], job: RolloutJob, cells: list[tuple[int, int]]
    ) -> tuple[RolloutBatch, float]:
        """Draw and score a part of a job; its rollouts, and seconds in the model."""
        if name != self.name:  # another search, or this worker is new
            # In a box, so that the tokenizer inside is not made again for each call.
            self.engine, self.name = LocalEngine(self.model, ray.get(boxed[0])), name
        engine, before = self.engine, self.engine.seconds
        assert engine.task.scorer is not None
        scorer = replace(engine.task.scorer, reward=self.reward)
        stream = scorer.stream()
        texts: list[str | None] = [None] * len(cells)

        def on_finish(number: int, tokens: list[int]) -> None:
            texts[number] = scorer.ask(stream, number, cells[number][0], tokens)

        noise = job.noise and replace(job.noise, mean=job.noise.mean.to(engine.device))
        batch = engine.roll(replace(job, cells=cells, noise=noise), on_finish)
        found = stream.collect()
        rewards = [found[number] for number in range(len(cells))]
        batch.scores = Scores(texts, rewards, stream.seconds, stream.calls)
        batch.dot, batch.common_dot = batch.dot.cpu(), batch.common_dot.cpu()
        return batch, engine.seconds - before

    def part(self, given: dict[str, Any], rollouts: tuple[int, int]) -> Tensor:
        """The weighted sum of the noise of some rollouts."""
        device = device_of(self.model)
        there: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()
        }
        mean = torch.zeros(there.pop("shape"), device=device)
        return ops.control_update(mean, rollouts=rollouts, **there).cpu()


class Rollouts:
    """``engine=`` of ``AdaptiveImportanceSampling`` and ``BestOfN``: rollouts drawn by workers.

    Rollouts are drawn and scored in *cells* of consecutive rollout numbers, which are the same
    however many workers there are. So the same batches go through model and reward, and tokens,
    rewards and u have the same bits for any number of workers. An iteration sends u to each
    worker; back come tokens, rewards and u . eps, then of each worker one sum of noise, and
    :func:`tta_ext.ops.control_merge` adds those up here.

    Args:
        workers, address, gpus_per_worker, threads: see :class:`Workers`.
        load: in each worker, makes the model and the reward that the search has here too; None
            sends them there, once.
        cell: rollouts of a cell; those of all prompts of a batch go together.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> with Rollouts(workers=4) as engine:
        ...     aisp = AdaptiveImportanceSampling(model, reward, tokenizer, engine=engine, n=64)
        ...     result = aisp.generate("Tell me a story.", seed=0)
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        load: Callable[[], tuple[Any, Any]] | None = None,
        cell: int = 16,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        threads: int | None = None,
    ) -> None:
        if cell < 1:
            raise ValueError(f"cell is {cell}, expected at least 1")
        self.cell, self.workers, self._load = cell, workers, load
        self._options: dict[str, Any] = {
            "address": address, "gpus": gpus_per_worker, "threads": threads
        }  # fmt: skip
        self._crew: Workers | None = None
        self._held: tuple[Any, Any] = (None, None)
        self._searches = 0

    def __call__(self, model: Any, task: RolloutTask) -> RolloutEngine:
        """The engine of one search; the workers stay for the next."""
        if task.scorer is None:
            raise ValueError("the task has no scorer, and rollouts are scored where they are drawn")
        held = model, task.scorer.reward
        if self._crew is None:
            connect(self._options["address"], self.workers)
            self._sent = None if self._load else ray.put(held)  # kept, for workers that restart
            load = self._load or partial(ray.get, self._sent)
            self._crew = Workers(lambda: _Roller(load), self.workers, **self._options)
            self._held = held
        if held[0] is not self._held[0] or held[1] is not self._held[1]:
            raise ValueError("the workers hold another model or reward; make Rollouts for each")
        self._searches += 1
        return _Sharded(self._crew, self._searches, model, task, self.cell)

    def close(self) -> None:
        """End the workers."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Sharded:
    """A :class:`RolloutEngine` over workers; u lies in this process, on the CPU."""

    def __init__(self, crew: Workers, name: int, model: Any, task: RolloutTask, cell: int) -> None:
        self._crew, self._name, self._task, self._cell = crew, name, task, cell
        self._sent: Any = None
        self.device, self.dimensions = torch.device("cpu"), head_inputs(model)
        self.seconds = 0.0

    def roll(self, job: RolloutJob, on_finish: OnFinish) -> RolloutBatch:
        groups: dict[int, list[int]] = {}
        for number, (_, rollout) in enumerate(job.cells):
            groups.setdefault(rollout // self._cell, []).append(number)
        parts = list(groups.values())
        if self._sent is None:
            assert self._task.scorer is not None
            scorer = replace(self._task.scorer, reward=_elsewhere)
            self._sent = ray.put(replace(self._task, scorer=scorer))
        which = [part % len(self._crew) for part in range(len(parts))]
        found = self._crew.call(
            which,
            "roll",
            [self._name] * len(parts),
            [[self._sent]] * len(parts),
            ray.put(replace(job, cells=())),
            [[job.cells[number] for number in part] for part in parts],
        )
        spent = [0.0] * len(self._crew)
        for worker, (_, seconds) in zip(which, found, strict=True):
            spent[worker] += seconds
        self.seconds += max(spent)
        return _joined(parts, [batch for batch, _ in found])

    def control_update(
        self, mean: Tensor, weights: Tensor, *, sigma: float, **given: Any
    ) -> Tensor:
        """:func:`tta_ext.ops.control_update`, an aligned part of the rollouts in each worker."""
        padded = 1 << (weights.shape[1] - 1).bit_length()
        parts = min(padded, 1 << (len(self._crew) - 1).bit_length())
        size = padded // parts
        sums = self._crew.call(
            [part % len(self._crew) for part in range(parts)],
            "part",
            ray.put({**given, "weights": weights, "sigma": sigma, "shape": tuple(mean.shape)}),
            [(at, at + size) for at in range(0, padded, size)],
        )
        return ops.control_merge(mean, torch.stack(sums), sigma)


def _joined(parts: list[list[int]], batches: list[RolloutBatch]) -> RolloutBatch:
    """One batch of the batches of parts of a job's cells."""
    order = torch.tensor([number for part in parts for number in part]).argsort()
    scores = [batch.scores for batch in batches if batch.scores is not None]

    def inline(columns: Iterable[list[Any]]) -> list[Any]:
        values = [value for column in columns for value in column]
        return [values[i] for i in order.tolist()]

    return RolloutBatch(
        tokens=inline(batch.tokens for batch in batches),
        finish=inline(batch.finish for batch in batches),
        dot=torch.cat([batch.dot for batch in batches])[order],
        common_dot=torch.cat([batch.common_dot for batch in batches])[order],
        **{
            name: {
                part[number]: value
                for part, batch in zip(parts, batches, strict=True)
                for number, value in getattr(batch, name).items()
            }
            for name in METERS
        },
        scores=Scores(
            inline(one.texts for one in scores),
            inline(one.rewards for one in scores),
            max(one.seconds for one in scores),
            sum(one.calls for one in scores),
        ),
    )

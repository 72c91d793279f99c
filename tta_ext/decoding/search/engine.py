"""What draws rollouts: the model here, or a foreign engine behind the same two calls.

A search makes a :class:`RolloutTask` when it starts and opens an engine on it; each iteration is a
:class:`RolloutJob`, and what comes back a :class:`RolloutBatch`. Noise, draws and the sums u . eps
are functions of the indices in task and job, so an engine that keeps the numerics contract may
spread a job over processes and machines as it likes and returns the same tokens and bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from tta_ext.decoding.runtime.fit import Fit, fit_model
from tta_ext.decoding.runtime.vocabulary import Vocabulary
from tta_ext.decoding.search.outcome import Candidate
from tta_ext.decoding.search.rollouts import PromptCache, Rollouts
from tta_ext.decoding.search.sampling import Noise, Sampling

__all__ = [
    "LocalEngine",
    "OnFinish",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutJob",
    "RolloutTask",
    "Scored",
]

# ``on_finish(i, tokens)``: the job's cell i has ended with these tokens.
OnFinish: TypeAlias = "Callable[[int, list[int]], None]"


@dataclass(frozen=True)
class RolloutTask:
    """What stays the same over a search.

    Attributes:
        prompts: token ids of each.
        sequence: sequence id of each prompt's random streams.
        sampling: how tokens come out of logits, and when a rollout ends.
        seed: 64-bit seed.
        vocabulary: the ids that may be drawn.
        batch_size: rows in a batch at most; None: as many as the job has.
        first: what messages call the first prompt.
        fit: how the model here is run; None: as :func:`fit_model` finds it, without a trial.
    """

    prompts: Sequence[Sequence[int]]
    sequence: Sequence[int]
    sampling: Sampling
    seed: int
    vocabulary: Vocabulary
    batch_size: int | None = None
    first: int = 0
    fit: Fit | None = None


@dataclass(frozen=True)
class RolloutJob:
    """The rollouts of one iteration.

    Attributes:
        cells: (prompt, rollout) of each.
        iteration: counter of the random streams.
        noise: what is added to the pre-logits; None leaves them alone.
        metered: rollouts below this have their divergence from the base model measured, where the
            engine can.
    """

    cells: Sequence[tuple[int, int]]
    iteration: int
    noise: Noise | None = None
    metered: int = 0


@dataclass
class RolloutBatch:
    """A job's rollouts, in the order of its cells.

    Attributes:
        tokens: ids of each, with the end-of-sequence id if one was drawn.
        finish: why each ended.
        dot, common_dot: float32 ``[cells]``, sum over a rollout's steps of u . eps, and the same of
            the noise's common part; on any device. Wanted where the job has noise.
        kl: measured divergence in nats of some cells, by their number.
    """

    tokens: list[list[int]] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    dot: Tensor = field(default_factory=lambda: torch.empty(0))
    common_dot: Tensor = field(default_factory=lambda: torch.empty(0))
    kl: dict[int, float] = field(default_factory=dict)


@dataclass
class Scored:
    """The rollouts of one iteration, and what the reward says of them.

    Attributes:
        candidates: for each active prompt, its rollouts in order.
        batch: the same as drawn: rollout by rollout, each time over all active prompts.
    """

    candidates: list[list[Candidate]]
    batch: RolloutBatch


class RolloutEngine(Protocol):
    """Draws rollouts.

    Attributes:
        device: where u lies.
        dimensions: d, size of the pre-logits.
        seconds: time inside the model so far.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def dimensions(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    def roll(self, job: RolloutJob, on_finish: OnFinish) -> RolloutBatch:
        """Draw a job's rollouts, naming each as it ends.

        Raises:
            ValueError: a model's logits make no law, with prompt, rollout and position.
        """


class LocalEngine:
    """Rollouts of a transformers model in this process.

    Args:
        model: a causal language model.
        task: what to draw.
        make: the class of rollouts, or something that makes them with its arguments.
    """

    def __init__(
        self, model: Any, task: RolloutTask, make: Callable[..., Rollouts] = Rollouts
    ) -> None:
        self.task, self._make = task, make
        self.prompts = PromptCache(
            model,
            task.prompts,
            task.sequence,
            task.vocabulary,
            task.fit or fit_model(model, "model", probe=False),
            task.sampling.max_new_tokens,
            task.first,
        )
        self.device, self.dimensions = self.prompts.device, self.prompts.dimensions
        self._seed = torch.tensor([task.seed], dtype=torch.int64, device=self.device)

    @property
    def seconds(self) -> float:
        return self.prompts.seconds

    def rollouts(self, job: RolloutJob) -> Rollouts:
        """A job's rollouts, to be advanced step by step."""
        return self._make(
            self.prompts,
            job.cells,
            sampling=self.task.sampling,
            seed=self._seed,
            iteration=job.iteration,
            noise=job.noise,
            metered=job.metered,
        )

    def roll(self, job: RolloutJob, on_finish: OnFinish) -> RolloutBatch:
        size = self.task.batch_size or max(len(job.cells), 1)
        batch = RolloutBatch()
        dots, common_dots = [], []
        for first in range(0, len(job.cells), size):
            rollouts = self.rollouts(replace(job, cells=job.cells[first : first + size]))
            rows = rollouts.rows
            while not rollouts.done:
                for i in rollouts.step():
                    on_finish(first + i, rows.tokens[i])
            batch.tokens += rows.tokens
            batch.finish += rows.finish
            batch.kl |= {first + i: value for i, value in rollouts.kl.items()}
            dots.append(rollouts.dot)
            common_dots.append(rollouts.common_dot)
        if dots:
            batch.dot, batch.common_dot = torch.cat(dots), torch.cat(common_dots)
        return batch

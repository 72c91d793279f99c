"""What draws rollouts: the model here, or a foreign engine behind the same two calls.

A search makes a :class:`RolloutTask` when it starts and opens an engine on it; each iteration is a
:class:`RolloutJob`, and what comes back a :class:`RolloutBatch`. Noise, draws and the sums u . eps
are functions of the indices in task and job, so an engine that keeps the numerics contract may
spread a job over processes and machines as it likes and returns the same tokens and bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from tta_ext.decoding.rewards import Reward, RewardStream
from tta_ext.decoding.runtime.fit import Fit, fit_model
from tta_ext.decoding.runtime.prompts import text_of
from tta_ext.decoding.runtime.stopping import StopStrings
from tta_ext.decoding.runtime.vocabulary import Vocabulary
from tta_ext.decoding.search.outcome import Candidate
from tta_ext.decoding.search.rollouts import PromptCache, Rollouts
from tta_ext.decoding.search.sampling import Noise, Sampling

__all__ = [
    "EngineFactory",
    "LocalEngine",
    "OnFinish",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutJob",
    "RolloutTask",
    "Scored",
    "Scorer",
    "Scores",
    "engine_of",
]

# What is measured of some cells, by their number: of rollouts and of batches.
METERS = "kl", "kl_fisher", "fisher", "bend"

# ``on_finish(i, tokens)``: the job's cell i has ended with these tokens.
OnFinish: TypeAlias = "Callable[[int, list[int]], None]"


@dataclass(frozen=True)
class Scorer:
    """How answers get before the reward.

    Attributes:
        prompts: as they were asked, for the reward.
        reward: the reward.
        tokenizer: makes text of answers; None: the reward sees ids.
        stop: stop strings that end an answer's text.
        batch_size: answers that the reward is asked about together; None: all that wait.
    """

    prompts: Sequence[Any]
    reward: Reward
    tokenizer: Any
    stop: StopStrings | None
    batch_size: int | None

    def stream(self) -> RewardStream:
        """What collects answers and asks."""
        return RewardStream(self.reward, self.batch_size)

    def ask(self, stream: RewardStream, key: Any, prompt: int, tokens: list[int]) -> str | None:
        """Put an answer, finished or not, before the reward; its text, None without a tokenizer."""
        if self.tokenizer is None:
            stream.put(key, self.prompts[prompt], tokens)
            return None
        text = text_of(self.tokenizer, tokens)
        text = text if self.stop is None else self.stop.cut(text)
        stream.put(key, self.prompts[prompt], text)
        return text


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
        scorer: for engines that score rollouts where they draw them; None: there is no reward.
    """

    prompts: Sequence[Sequence[int]]
    sequence: Sequence[int]
    sampling: Sampling
    seed: int
    vocabulary: Vocabulary
    batch_size: int | None = None
    first: int = 0
    fit: Fit | None = None
    scorer: Scorer | None = None


@dataclass(frozen=True)
class RolloutJob:
    """The rollouts of one iteration.

    Attributes:
        cells: (prompt, rollout) of each.
        iteration: counter of the random streams.
        noise: what is added to the pre-logits; None leaves them alone.
        metered: rollouts below this have their divergence from the base model measured, where the
            engine can.
        fisher: measure F u and its bend on them too, where the engine can.
    """

    cells: Sequence[tuple[int, int]]
    iteration: int
    noise: Noise | None = None
    metered: int = 0
    fisher: bool = False


class Scores(NamedTuple):
    """What the reward says of a job's rollouts, in the order of its cells.

    Attributes:
        texts: of each, None without a tokenizer.
        rewards: of each.
        seconds, calls: time inside the reward, and how often it was asked.
    """

    texts: list[str | None]
    rewards: list[float]
    seconds: float
    calls: int


@dataclass
class RolloutBatch:
    """A job's rollouts, in the order of its cells.

    Attributes:
        tokens: ids of each, with the end-of-sequence id if one was drawn.
        finish: why each ended.
        dot, common_dot: float32 ``[cells]``, sum over a rollout's steps of u . eps, and the same of
            the noise's common part; on any device. Wanted where the job has noise.
        kl: measured divergence in nats of some cells, by their number.
        kl_fisher, fisher, bend: of the same cells, where the engine measures them, the part of u
            alone to second order, F u, and how far one may go along it
            (:class:`~tta_ext.decoding.search.rollouts.Rollouts`).
        scores: from an engine that has scored them itself; None: the search does.
    """

    tokens: list[list[int]] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    dot: Tensor = field(default_factory=lambda: torch.empty(0))
    common_dot: Tensor = field(default_factory=lambda: torch.empty(0))
    kl: dict[int, float] = field(default_factory=dict)
    kl_fisher: dict[int, float] = field(default_factory=dict)
    fisher: dict[int, Tensor] = field(default_factory=dict)
    bend: dict[int, Tensor] = field(default_factory=dict)
    scores: Scores | None = None

    def of_prompts(self, meter: str, prompts: int) -> list[Any]:
        """Means of a meter over each prompt's measured cells, which lie rollout by rollout; None
        where there is none.
        """
        rows: list[list[Any]] = [[] for _ in range(prompts)]
        for number, value in sorted(getattr(self, meter).items()):
            rows[number % prompts].append(value)
        return [sum(values) / len(values) if values else None for values in rows]


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

    One that spreads them over machines may have ``control_update`` too, with the arguments and the
    bits of :func:`tta_ext.ops.control_update`.

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
        """Draw a job's rollouts, naming each as it ends unless it scores them itself.

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: rollouts of {len(self.task.prompts)} prompts>"

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
            fisher=job.fisher,
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
            for name in METERS:
                found = {first + i: value for i, value in getattr(rollouts, name).items()}
                getattr(batch, name).update(found)
            dots.append(rollouts.dot)
            common_dots.append(rollouts.common_dot)
        if dots:
            batch.dot, batch.common_dot = torch.cat(dots), torch.cat(common_dots)
        return batch


# Opens an engine for a search of a model.
EngineFactory: TypeAlias = "Callable[[Any, RolloutTask], RolloutEngine]"


def engine_of(engine: EngineFactory | str, workers: int | None) -> EngineFactory:
    """What a search's ``engine`` and ``workers`` ask for.

    Raises:
        ImportError: Ray is not installed.
        ValueError: another name, or workers of an engine that has none.
    """
    if not isinstance(engine, str):
        if workers is not None:
            raise ValueError(f"workers is {workers}, but only engine='ray' has workers")
        return engine
    if engine != "ray":
        raise ValueError(f"engine is {engine!r}, expected 'ray' or a function of model and task")
    # By its name, as searches know no foreign engine.
    rollouts = import_module("tta_ext.engines.ray").Rollouts
    found: EngineFactory = rollouts(1 if workers is None else workers)
    return found

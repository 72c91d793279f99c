"""What a search by reward returns: the best answers, all rewards, a curve for each prompt, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from textwrap import shorten
from typing import Any

from torch import Tensor

from tta_ext.decoding.runtime.rows import picked_rows
from tta_ext.frames import to_pandas

__all__ = ["Candidate", "IterationRecord", "SearchResult", "Timing"]


@dataclass(frozen=True)
class Candidate:
    """One scored answer.

    Attributes:
        text: the answer without special tokens, cut before a stop string; None without a tokenizer.
        tokens: its ids, with the end-of-sequence id if one was drawn.
        reward: its reward.
        iteration, rollout: which rollout it was.
        finish: ``"eos"``, ``"stop"`` or ``"length"``.
    """

    text: str | None
    tokens: list[int]
    reward: float
    iteration: int
    rollout: int
    finish: str


@dataclass(frozen=True)
class IterationRecord:
    """One iteration of one prompt. Fields that a method does not have are None.

    Attributes:
        iteration: its number.
        samples: answers scored so far, unfinished ones included.
        mean, max, std: of this iteration's rewards (std: population; -inf rewards enter as such).
        best: highest reward so far.
        ess: effective sample size of the importance weights, 1 to the number of rollouts.
        norm: Euclidean norm of u, the mean of the noise (of all its parts together), under which
            these rollouts were drawn.
        kl: measured divergence from the base model in nats an answer: of the next-token laws along
            the first rollouts, summed over steps; it contains the noise's own part.
        kl_fisher: what u alone has moved those laws by, to second order: half the variance of its
            shift of the logits, summed over steps. None from an engine that does not measure it.
        kl_bound: ``|u|^2 / (2 sigma^2)``, the divergence of the noise from noise without a mean,
            summed over its parts. It bounds what the change of u has done to the law of answers.
        sigma, lam: as used, in absolute units.
        length: mean number of tokens.
        distinct: number of different answers among the rollouts.
        tokens: tokens generated so far.
        seconds: wall-clock since the start of the search, of the whole batch of prompts.
    """

    iteration: int
    samples: int
    mean: float
    max: float
    std: float
    best: float
    length: float
    distinct: int
    tokens: int
    seconds: float
    ess: float | None = None
    norm: float | None = None
    kl: float | None = None
    kl_fisher: float | None = None
    kl_bound: float | None = None
    sigma: float | None = None
    lam: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass
class Timing:
    """Wall-clock of a search; ``+`` adds two.

    Attributes:
        total: from encoded prompts to the result.
        model: inside the model's forwards, cache updates included, without the noise. On CUDA a
            time of submission unless the model waits for the device.
        reward: spent waiting for the reward.
        reward_calls: calls of the reward.
        reward_items: answers it was asked about.
        tokens: tokens generated.
    """

    total: float = 0.0
    model: float = 0.0
    reward: float = 0.0
    reward_calls: int = 0
    reward_items: int = 0
    tokens: int = 0

    @property
    def other(self) -> float:
        """Everything else: noise, draws, updates, bookkeeping."""
        return self.total - self.model - self.reward

    def __add__(self, other: Timing) -> Timing:
        return Timing(**{key: value + getattr(other, key) for key, value in asdict(self).items()})

    def as_dict(self) -> dict[str, float]:
        """The fields and the rest, for JSON."""
        return asdict(self) | {"other": self.other}


@dataclass(repr=False)
class SearchResult:
    """Answers of one call, in the order of the prompts.

    Attributes:
        method: name of the method.
        prompts: the prompts as they were given.
        best: the best answer to each: highest reward, ties to the earliest.
        candidates: all scored answers of each prompt, in the order of iteration and rollout.
        curves: one :class:`IterationRecord` an iteration, for each prompt.
        stopped: why each prompt's search ended: ``"iterations"``, ``"reward"`` (target reached),
            ``"ess"``, ``"seconds"``.
        seed, sequence: with the settings they reproduce the run.
        timing: wall-clock of the whole batch.
        training: answers that were drawn and scored, once for all prompts, to train what the method
            uses; no part of ``samples``.
        mean: final u, float32 ``[P, tau, d]``, of methods that have one.

    An index or a slice, and iteration, give results of some of the prompts, with the whole batch's
    wall-clock.
    """

    method: str
    prompts: list[Any]
    best: list[Candidate]
    candidates: list[list[Candidate]]
    curves: list[list[IterationRecord]]
    stopped: list[str]
    seed: int
    sequence: list[int]
    timing: Timing = field(default_factory=Timing)
    training: int = 0
    mean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.best)

    def __getitem__(self, index: int | slice) -> SearchResult:
        chosen, picked = picked_rows(self, index)
        mean = None if self.mean is None else self.mean[chosen]
        return replace(self, **picked, mean=mean)

    def __repr__(self) -> str:
        first = ""
        if self.best:
            one = self.best[0]
            text = shorten(repr(one.text or one.tokens), 80, placeholder=" ...")
            first = f"; first {text} with reward {one.reward:.4g}"
        return (
            f"<{type(self).__name__} of {self.method}: {len(self)} prompts, "
            f"{sum(self.samples)} answers scored, seed {self.seed}{first}>"
        )

    @property
    def texts(self) -> list[str]:
        """The best answers' texts; ``ValueError`` without a tokenizer."""
        texts = [one.text for one in self.best]
        if any(text is None for text in texts):
            raise ValueError(
                "the result has no text, as there is no tokenizer; use .best[i].tokens"
            )
        return [text for text in texts if text is not None]

    @property
    def text(self) -> str:
        """The only prompt's best answer."""
        if len(self.best) != 1:
            raise ValueError(f"the result has {len(self.best)} answers; use .texts")
        return self.texts[0]

    @property
    def rewards(self) -> list[list[float]]:
        """All rewards of each prompt, in order."""
        return [[one.reward for one in candidates] for candidates in self.candidates]

    @property
    def samples(self) -> list[int]:
        """Number of answers scored for each prompt."""
        return [len(candidates) for candidates in self.candidates]

    def as_dict(self) -> dict[str, Any]:
        """Everything but u and the candidates other than the best, for JSON."""
        return {
            "method": self.method,
            "prompts": self.prompts,
            "best": [asdict(one) for one in self.best],
            "rewards": self.rewards,
            "curves": [[one.as_dict() for one in curve] for curve in self.curves],
            "stopped": self.stopped,
            "seed": self.seed,
            "sequence": self.sequence,
            "timing": self.timing.as_dict(),
            "training": self.training,
        }

    def to_pandas(self, of: str = "best") -> Any:
        """A ``pandas.DataFrame``, each row with the number of its ``prompt``.

        Args:
            of: ``"best"``, the best answer to each prompt; ``"candidates"``, all scored answers
                (fields of :class:`Candidate`); ``"iterations"``, the curves (fields of
                :class:`IterationRecord`).

        Raises:
            ValueError: another ``of``.
            ImportError: pandas is missing; the message has the command.
        """
        kinds: dict[str, Sequence[Sequence[Any]]] = {
            "best": [[one] for one in self.best],
            "candidates": self.candidates,
            "iterations": self.curves,
        }
        if of not in kinds:
            raise ValueError(f"of is {of!r}, expected one of {', '.join(kinds)}")
        return to_pandas(
            {"prompt": prompt} | asdict(one)
            for prompt, found in enumerate(kinds[of])
            for one in found
        )

    @staticmethod
    def concatenate(parts: Sequence[SearchResult]) -> SearchResult:
        """One result of several with the same seed and settings; of several, without u."""
        if not parts:
            raise ValueError("there is nothing to concatenate")
        first = parts[0]
        if len(parts) == 1:
            return first
        joined: dict[str, Any] = {
            one.name: [x for part in parts for x in getattr(part, one.name)]
            for one in fields(first)
            if isinstance(getattr(first, one.name), list)
        }
        timing = sum((part.timing for part in parts), Timing())
        return replace(first, **joined, timing=timing, mean=None)


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of the highest reward, ties to the first."""
    return max(candidates, key=lambda one: one.reward)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, maximum and population standard deviation; with -inf among them as IEEE has it."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    # Squares of such values would overflow.
    scale = 2.0**-600 if largest > 1e150 else 1.0
    scaled = [value * scale for value in values]
    mean = sum(scaled) / len(scaled)
    if math.isinf(mean):
        return mean, max(values), math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in scaled) / len(scaled))
    return mean / scale, max(values), deviation / scale

"""Settings that all searches share, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from tta_ext import rng
from tta_ext.decoding.runtime.prompts import whole_number
from tta_ext.decoding.runtime.stopping import StopStrings
from tta_ext.decoding.search.ranges import check_range
from tta_ext.decoding.search.sampling import Sampling
from tta_ext.journal import fingerprint

__all__ = ["SearchOptions", "SearchSettings", "check_counts", "check_samples", "settings_facts"]


@dataclass(frozen=True)
class SearchSettings:
    """Settings that all methods share.

    Attributes:
        max_new_tokens: tokens after which an answer ends.
        decoding: ``"sample"`` draws tokens, ``"greedy"`` takes the most probable ones.
        temperature, top_k, top_p: of the draw; see :class:`Sampling`.
        eos_token_id: an id or several that end an answer; None: the model's.
        stop_strings: strings that end an answer; its text is cut before them.
        batch_size: rows in a batch at most; None: all rollouts of all prompts at once.
        reward_batch_size: ask the reward as soon as so many answers have finished; None: once an
            iteration.
        reward_target: a prompt's search ends when its best reward reaches this.
        max_seconds: no iteration starts after this time.
    """

    max_new_tokens: int = 64
    decoding: str = "sample"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    batch_size: int | None = None
    reward_batch_size: int | None = None
    reward_target: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        self.sampling()
        check_range(self, "at least 1", "batch_size", "reward_batch_size")
        check_range(self, "more than 0", "max_seconds")

    def sampling(
        self, ends: frozenset[int] = frozenset(), stop: StopStrings | None = None
    ) -> Sampling:
        """How tokens are drawn, and when a rollout ends."""
        draw = self.decoding, self.temperature, self.top_k, self.top_p
        return Sampling(*draw, self.max_new_tokens, ends, stop)

    def schedule(self) -> list[int]:
        """Number of rollouts of each iteration."""
        raise TypeError(f"{type(self).__name__} has no iterations")

    def for_samples(self, samples: int) -> SearchSettings:
        """These settings, made to write about so many answers' worth of tokens a prompt."""
        raise TypeError(f"{type(self).__name__} has no number of samples")

    def for_seconds(self, seconds: float) -> SearchSettings:
        """These settings, made to go on until a time has passed."""
        raise TypeError(f"{type(self).__name__} has no iterations")


class SearchOptions(TypedDict, total=False):
    """The fields of :class:`SearchSettings` as keywords."""

    max_new_tokens: int
    decoding: str
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    batch_size: int | None
    reward_batch_size: int | None
    reward_target: float | None
    max_seconds: float | None


def check_samples(samples: int, least: int) -> int:
    """The number itself; ``ValueError`` if a method cannot do with so few."""
    if samples < least:
        raise ValueError(f"samples is {samples}, expected at least {least} with these settings")
    return samples


def check_counts(rollouts: int, iterations: int) -> None:
    """``ValueError`` unless the random streams have counters for so many."""
    whole_number("n", rollouts, None)
    whole_number("iterations", iterations, None)
    if not 1 <= rollouts <= rng.ROLLOUTS:
        raise ValueError(f"n is {rollouts}, expected 1 to {rng.ROLLOUTS} rollouts an iteration")
    if not 1 <= iterations <= rng.ITERATIONS:
        raise ValueError(f"iterations is {iterations}, expected 1 to {rng.ITERATIONS}")


def settings_facts(settings: SearchSettings) -> dict[str, Any]:
    """What a resume key holds of settings: themselves, and what is in the file that they name."""
    path: str | None = getattr(settings, "value", None)
    known = {} if path is None or not Path(path).is_file() else {"value": fingerprint(path)}
    return {"settings": asdict(settings), **known}

"""Best-of-n: draw n answers, keep the one that the reward prefers; and its soft form.

The yardstick of every search by reward, on the same rollouts and the same accounting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import Unpack

from tta_ext import ops, rng
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.search.base import Search, SearchMethod
from tta_ext.decoding.search.engine import EngineFactory, LocalEngine
from tta_ext.decoding.search.outcome import Candidate, SearchResult
from tta_ext.decoding.search.ranges import check_range
from tta_ext.decoding.search.settings import (
    SearchOptions,
    SearchSettings,
    check_counts,
    check_samples,
)

__all__ = ["BestOfN", "BestOfNSettings", "soft_choice"]


@dataclass(frozen=True)
class BestOfNSettings(SearchSettings):
    """Settings of best-of-n.

    Attributes:
        n: answers drawn in total.
        group: answers drawn together; sample j is rollout ``j mod group`` of iteration
            ``j div group``. None: all at once.
        soft: 0 keeps the best; above 0, the answer is drawn with probability proportional to
            ``exp(reward / soft)`` (soft best-of-n).
    """

    n: int = 32
    group: int | None = None
    soft: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "at least 1", "n", "group")
        check_range(self, "a finite number >= 0", "soft")
        schedule = self.schedule()
        check_counts(max(schedule), len(schedule))

    def schedule(self) -> list[int]:
        group = self.n if self.group is None else min(self.group, self.n)
        whole, rest = divmod(self.n, group)
        return [group] * whole + ([rest] if rest else [])

    def for_samples(self, samples: int) -> BestOfNSettings:
        return replace(self, n=check_samples(samples, 1))

    def for_seconds(self, seconds: float) -> BestOfNSettings:
        group = self.n if self.group is None else self.group
        return replace(self, n=group * rng.ITERATIONS, group=group, max_seconds=seconds)


class BestOfNOptions(SearchOptions, total=False):
    """The fields of :class:`BestOfNSettings` as keywords."""

    n: int
    group: int | None
    soft: float


class _Run(Search[BestOfNSettings]):
    def choose(self, prompt: int) -> Candidate:
        soft = self.settings.soft
        if soft == 0.0:
            return super().choose(prompt)
        candidates = self.candidates[prompt]
        rewards = [one.reward for one in candidates]
        return candidates[soft_choice(rewards, soft, self.seed, self.sequence[prompt])]


def soft_choice(rewards: Sequence[float], soft: float, seed: int, sequence: int) -> int:
    """Which answer soft best-of-n takes of those with these rewards."""
    highest = max(rewards)
    if highest == -math.inf:
        return 0
    logits = torch.tensor([[(one - highest) / soft for one in rewards]], dtype=torch.float32)
    return int(
        ops.categorical_sample(logits, seed=seed, position=0, sequence=sequence, stream=rng.REWARD)
    )


class BestOfN(SearchMethod[BestOfNSettings]):
    """Draw n answers and keep the best, or a soft choice among them.

    Args:
        settings: fields of :class:`BestOfNSettings` and
            :class:`SearchSettings`; the rest as in
            :class:`SearchMethod`.

    Example:
        >>> BestOfN(model, reward, tokenizer, n=32).generate("Tell me a story.", seed=0).text

    Source: soft best-of-n: Verdun et al., arXiv:2505.03156.
    """

    name: ClassVar[str] = "best_of_n"
    settings_type = BestOfNSettings
    run_type = _Run

    if TYPE_CHECKING:
        # What __init_subclass__ shows at run time.
        def __init__(
            self,
            model: Any,
            reward: Reward,
            tokenizer: Any = None,
            *,
            chat_template: str | None = None,
            probe: bool = True,
            runner: str | None = None,
            engine: EngineFactory | str = LocalEngine,
            workers: int | None = None,
            **settings: Unpack[BestOfNOptions],
        ) -> None: ...

        def generate(  # type: ignore[override]
            self,
            prompts: Any,
            *,
            seed: int | torch.Generator | None = None,
            sequence: Sequence[int] | None = None,
            progress: Callable[[int], None] | None = None,
            **settings: Unpack[BestOfNOptions],
        ) -> SearchResult: ...

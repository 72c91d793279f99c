"""RE-Control: gradient steps on the pre-logits, up a trained value function (arXiv:2406.05954).

Before each token the input h of the model's head is moved a few steps along the slope of V(h), the
reward that the answer is expected to have (:mod:`value`); then the token is drawn. With no steps,
or steps of size 0, it is plain sampling, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from tta_ext import rng
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.runtime.prompts import whole_number
from tta_ext.decoding.search.base import Search, SearchMethod
from tta_ext.decoding.search.engine import LocalEngine, RolloutJob, RolloutTask, Scored
from tta_ext.decoding.search.outcome import SearchResult
from tta_ext.decoding.search.ranges import check_range
from tta_ext.decoding.search.rollouts import PromptCache, Rollouts
from tta_ext.decoding.search.settings import (
    SearchOptions,
    SearchSettings,
    check_counts,
    check_samples,
)
from tta_ext.decoding.search.value import ValueHead, value_for

__all__ = ["ReControlSearch", "ReControlSettings"]


@dataclass(frozen=True)
class ReControlSettings(SearchSettings):
    """Settings of RE-Control.

    Attributes:
        value: file of the value function (``tta value``, or :func:`~.value.train_value` and
            :meth:`~.value.ValueHead.save`).
        steps: gradient steps before each token.
        step_size: of each, see :meth:`~.value.ValueHead.ascend`.
        n: answers to each prompt drawn together, of which the best counts.
        restarts: times that this is done.
        kl_rollouts: answers on which the divergence from the base model is measured each time.
    """

    value: str | None = None
    steps: int = 4
    step_size: float = 1.0
    n: int = 1
    restarts: int = 1
    kl_rollouts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.n, self.restarts)
        for name in ("steps", "kl_rollouts"):
            if whole_number(name, getattr(self, name), None) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        check_range(self, "a finite number >= 0", "step_size")
        if self.value is None:
            raise ValueError("RE-Control needs value=FILE, which tta value makes")

    def schedule(self) -> list[int]:
        return [self.n] * self.restarts

    def for_samples(self, samples: int) -> ReControlSettings:
        return replace(self, n=check_samples(samples, 1), restarts=1)

    def for_seconds(self, seconds: float) -> ReControlSettings:
        return replace(self, restarts=rng.ITERATIONS, max_seconds=seconds)


class ReControlOptions(SearchOptions, total=False):
    """The fields of :class:`ReControlSettings` as keywords."""

    value: str | None
    steps: int
    step_size: float
    n: int
    restarts: int
    kl_rollouts: int


class ControlledRollouts(Rollouts):
    """Rollouts whose pre-logits are moved up a value function."""

    def __init__(
        self,
        head: ValueHead,
        settings: ReControlSettings,
        prompts: PromptCache,
        cells: Any,
        **options: Any,
    ) -> None:
        super().__init__(prompts, cells, **options)
        self.head, self.settings = head, settings

    def changed(self, hidden: Tensor) -> Tensor:
        return self.head.ascend(hidden, self.settings.steps, self.settings.step_size)


class ReControlRun(Search[ReControlSettings]):
    """The state of one run of RE-Control."""

    def open(self, task: RolloutTask) -> LocalEngine:
        assert self.settings.value is not None
        self.head = value_for(self.settings.value, self.method.model)
        make = partial(ControlledRollouts, self.head, self.settings)
        return LocalEngine(self.method.model, task, make)

    @property
    def training(self) -> int:
        return self.head.samples

    def job(self, cells: Sequence[tuple[int, int]]) -> RolloutJob:
        moved = self.settings.steps > 0 and self.settings.step_size > 0.0
        metered = self.settings.kl_rollouts if moved else 0
        return RolloutJob(cells, self.iteration, metered=metered)

    def update(self, active: list[int], scored: Scored) -> list[dict[str, Any]]:
        return [{"kl": value} for value in scored.batch.of_prompts("kl", len(active))]


class ReControlSearch(SearchMethod[ReControlSettings]):
    """RE-Control.

    Args:
        settings: fields of :class:`ReControlSettings` and :class:`SearchSettings`; the rest as in
            :class:`SearchMethod`.

    Example:
        >>> train_value(model, reward, prompts, tokenizer).save("value.safetensors")
        >>> method = ReControlSearch(model, reward, tokenizer, value="value.safetensors")
        >>> method.generate("Tell me a story.", seed=0).text
    """

    name: ClassVar[str] = "re_control"
    settings_type = ReControlSettings
    run_type = ReControlRun
    stepwise = True

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
            **settings: Unpack[ReControlOptions],
        ) -> None: ...

        def generate(  # type: ignore[override]
            self,
            prompts: Any,
            *,
            seed: int | torch.Generator | None = None,
            sequence: Sequence[int] | None = None,
            progress: Callable[[int], None] | None = None,
            **settings: Unpack[ReControlOptions],
        ) -> SearchResult: ...

"""ARGS: alignment as reward-guided search, token by token (arXiv:2402.01694).

At each step the k most probable tokens v of each answer y are scored by

    log p(v | x, y) + weight * reward(x, y + v)

and the best is taken (``decoding="greedy"``) or one is drawn with probability proportional to
exp(score / temperature) (``"sample"``). A candidate that ends the answer is judged as a finished
one. The reward must make sense of unfinished answers, and is asked k times a token: all candidates
of all answers of all prompts in one call.

With ``value=`` a trained value function takes the reward's place (controlled decoding,
arXiv:2310.17022): V of the pre-logits after each candidate, at the price of k rows of the model a
token. The reward is then asked about finished answers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from tta_ext import rng
from tta_ext.decoding.rewards import Reward, RewardStream
from tta_ext.decoding.search.base import Search, SearchMethod
from tta_ext.decoding.search.engine import LocalEngine, RolloutTask
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

__all__ = ["RewardGuidedSearch", "RewardGuidedSettings"]


@dataclass(frozen=True)
class RewardGuidedSettings(SearchSettings):
    """Settings of ARGS.

    Attributes:
        n: answers to each prompt drawn together, of which the best counts; more than one only makes
            sense with ``decoding="sample"``.
        restarts: times that this is done.
        decoding: ``"greedy"`` (default) or ``"sample"``.
        candidates: k, tokens that the reward looks at.
        weight: of the reward against the log-probability.
        value: file of a value function (``tta value``) that judges the candidates in place of the
            reward; None: the reward does.
    """

    n: int = 1
    restarts: int = 1
    decoding: str = "greedy"
    candidates: int = 10
    weight: float = 1.5
    value: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.n, self.restarts)
        check_range(self, "at least 1", "candidates")
        check_range(self, "a finite number", "weight")
        if self.top_k is not None or self.top_p is not None:
            raise ValueError("ARGS chooses among its candidates; top_k and top_p must be None")

    def schedule(self) -> list[int]:
        return [self.n] * self.restarts

    def for_samples(self, samples: int) -> RewardGuidedSettings:
        # Greedy answers would all be the same.
        decoding = self.decoding if samples == 1 else "sample"
        return replace(self, n=check_samples(samples, 1), restarts=1, decoding=decoding)

    def for_seconds(self, seconds: float) -> RewardGuidedSettings:
        return replace(self, restarts=rng.ITERATIONS, decoding="sample", max_seconds=seconds)


class RewardGuidedOptions(SearchOptions, total=False):
    """The fields of :class:`RewardGuidedSettings` as keywords."""

    n: int
    restarts: int
    candidates: int
    weight: float
    value: str | None


class GuidedRollouts(Rollouts):
    """Rollouts whose tokens are chosen with the reward's help."""

    def __init__(self, run: GuidedRun, prompts: PromptCache, cells: Any, **options: Any) -> None:
        super().__init__(prompts, cells, **options)
        self.run_of = run

    def draw(self, logits: Tensor) -> Tensor:
        run, sampling = self.run_of, self.sampling
        log_p = torch.log_softmax(logits.float(), dim=-1)
        count = min(run.settings.candidates, log_p.shape[-1])
        # Stable, so that ties go to the lowest id on every device.
        values, tokens = log_p.sort(dim=-1, descending=True, stable=True)
        values, tokens = values[:, :count], tokens[:, :count]
        table = self._asked(tokens) if run.value is None else self._valued(run.value, tokens)
        score = values + run.settings.weight * table
        # Impossible tokens stay impossible; where the reward rules everything out it has no say.
        score = torch.where(torch.isinf(values), -math.inf, score)
        lost = torch.isinf(score).all(-1, keepdim=True)
        score = torch.where(lost, values, score)
        chosen = self.pick(score, sampling, rng.REWARD)
        token = tokens.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
        return torch.where(chosen < 0, chosen, token)

    def _asked(self, tokens: Tensor) -> Tensor:
        """The reward of each answer with each candidate ``[active, k]``."""
        run = self.run_of
        for row, ids in enumerate(tokens.tolist()):
            cell = self.rows.active[row]
            prompt, written = self.cells[cell][0], self.rows.tokens[cell]
            run.asked[prompt] += len(ids)
            for place, token in enumerate(ids):
                run.scorer.ask(run.guide, (row, place), prompt, [*written, token])
        rewards = run.guide.collect()
        return torch.tensor(
            [[rewards[row, at] for at in range(tokens.shape[1])] for row in range(len(tokens))],
            dtype=torch.float32,
            device=tokens.device,
        )

    def _valued(self, value: ValueHead, tokens: Tensor) -> Tensor:
        """V after each candidate."""
        source = self._runner or self.prompts.runner
        count, rows = tokens.shape[1], range(len(tokens))
        of = rows if self._runner is not None else self._prompt.tolist()
        ahead = self.prompts.ahead(
            source, [row for row in of for _ in range(count)], tokens.flatten().tolist()
        )
        return value(ahead).view_as(tokens)


class GuidedRun(Search[RewardGuidedSettings]):
    """The state of one run of ARGS."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.guide = RewardStream(self.method.reward, self.settings.reward_batch_size)
        self.streams.append(self.guide)

    @property
    def training(self) -> int:
        return 0 if self.value is None else self.value.samples

    def open(self, task: RolloutTask) -> LocalEngine:
        path = self.settings.value
        self.value = None if path is None else value_for(path, self.method.model)
        return LocalEngine(self.method.model, task, partial(GuidedRollouts, self))


class RewardGuidedSearch(SearchMethod[RewardGuidedSettings]):
    """ARGS; the final answers' rewards are asked for once more, so results compare.

    Args:
        settings: fields of :class:`RewardGuidedSettings` and
            :class:`SearchSettings`; the rest as in
            :class:`SearchMethod`.
    """

    name: ClassVar[str] = "args"
    settings_type = RewardGuidedSettings
    run_type = GuidedRun
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
            **settings: Unpack[RewardGuidedOptions],
        ) -> None: ...

        def generate(  # type: ignore[override]
            self,
            prompts: Any,
            *,
            seed: int | torch.Generator | None = None,
            sequence: Sequence[int] | None = None,
            progress: Callable[[int], None] | None = None,
            **settings: Unpack[RewardGuidedOptions],
        ) -> SearchResult: ...

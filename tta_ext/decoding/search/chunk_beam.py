"""Chunk-level beam search by reward.

Each of b beams is continued in m ways by a chunk of L sampled tokens; the reward judges what is
there so far, finished or not; the best b go on. L = ``max_new_tokens`` is best-of-(b m).

Source: controlled decoding, blockwise (Mudgal et al., arXiv:2310.17022); chunk-level beam search
(Zhou et al., arXiv:2405.19262). The reward must make sense of unfinished answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import Unpack

from tta_ext import rng
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.search.base import Scored, Search, SearchMethod
from tta_ext.decoding.search.engine import LocalEngine, RolloutBatch
from tta_ext.decoding.search.outcome import Candidate, SearchResult
from tta_ext.decoding.search.settings import (
    SearchOptions,
    SearchSettings,
    check_counts,
    check_samples,
)

__all__ = ["ChunkBeamSearch", "ChunkBeamSettings"]


@dataclass(frozen=True)
class ChunkBeamSettings(SearchSettings):
    """Settings of chunk-level beam search.

    Attributes:
        beams: b, answers kept after each chunk.
        branches: m, continuations of each.
        chunk: L, tokens of a chunk.
        restarts: times that the whole search is done; the best answer of all counts.
    """

    beams: int = 4
    branches: int = 4
    chunk: int = 16
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beams", "branches", "chunk", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        check_counts(self.beams * self.branches, self.chunks * self.restarts)

    @property
    def chunks(self) -> int:
        """Chunks of the longest answer."""
        return -(-self.max_new_tokens // self.chunk)

    def schedule(self) -> list[int]:
        return [self.beams * self.branches] * self.restarts

    def for_samples(self, samples: int) -> ChunkBeamSettings:
        rows = self.beams * self.branches
        return replace(self, restarts=check_samples(samples, rows) // rows)

    def for_seconds(self, seconds: float) -> ChunkBeamSettings:
        return replace(self, restarts=rng.ITERATIONS // self.chunks, max_seconds=seconds)


class ChunkBeamOptions(SearchOptions, total=False):
    """The fields of :class:`ChunkBeamSettings` as keywords."""

    beams: int
    branches: int
    chunk: int
    restarts: int


@dataclass
class _Beam:
    """One candidate; ``cell`` is its row while it goes on, None once it has finished."""

    tokens: list[int]
    text: str | None
    finish: str
    iteration: int
    rollout: int
    cell: int | None
    reward: float = field(default=0.0)


class _Run(Search[ChunkBeamSettings]):
    def roll(self, active: list[int], count: int) -> Scored:
        settings = self.settings
        assert isinstance(self.engine, LocalEngine)
        rollouts = self.engine.rollouts(self.job([(p, j) for j in range(count) for p in active]))
        rows = rollouts.rows
        finished: dict[int, list[_Beam]] = {prompt: [] for prompt in active}
        drawn = dict.fromkeys(active, 0)
        first = self.iteration * settings.chunks
        for chunk in range(first, first + settings.chunks):
            rollouts.iteration = chunk
            before = [len(tokens) for tokens in rows.tokens]
            for _ in range(settings.chunk):
                if not rollouts.done:
                    rollouts.step()
            going = set(rows.active)
            pools: dict[int, list[_Beam]] = {prompt: [] for prompt in active}
            for cell, (prompt, rollout) in enumerate(rollouts.cells):
                tokens = rows.tokens[cell]
                text = self.text(tokens)
                drawn[prompt] += len(tokens) - before[cell]
                self.stream.put(
                    (prompt, rollout), self.prompts[prompt], tokens if text is None else text
                )
                self.asked[prompt] += 1
                row = cell if cell in going else None
                pools[prompt].append(_Beam(tokens, text, rows.finish[cell], chunk, rollout, row))
            rewards = self.stream.collect()
            for prompt in active:
                for beam in pools[prompt]:
                    beam.reward = rewards[prompt, beam.rollout]
            plan = []
            for prompt in active:
                # Stable: ties go to what finished first, then to the lowest rollout.
                pool = sorted(finished[prompt] + pools[prompt], key=lambda beam: -beam.reward)
                kept = pool[: settings.beams]
                finished[prompt] = [beam for beam in kept if beam.cell is None]
                parents = [beam.cell for beam in kept if beam.cell is not None]
                plan += [
                    (rank * settings.branches + branch, prompt, parent)
                    for rank, parent in enumerate(parents)
                    for branch in range(settings.branches)
                ]
            if not plan:
                break
            plan.sort(key=lambda item: item[0])
            rollouts.branch(
                [(prompt, rollout) for rollout, prompt, _ in plan], [parent for *_, parent in plan]
            )
        found = []
        for prompt in active:
            final = sorted(finished[prompt], key=lambda beam: (beam.iteration, beam.rollout))
            found.append(
                [
                    Candidate(b.text, b.tokens, b.reward, b.iteration, b.rollout, b.finish)
                    for b in final
                ]
            )
            # The answers themselves are counted when they are recorded.
            self.tokens[prompt] += drawn[prompt] - sum(len(b.tokens) for b in final)
            self.asked[prompt] -= len(final)
        none = RolloutBatch([], [], torch.empty(0), torch.empty(0), {})
        return Scored(found, none, len(active), self.engine.device)


class ChunkBeamSearch(SearchMethod[ChunkBeamSettings]):
    """Beam search whose steps are chunks of sampled tokens and whose score is the reward.

    The candidates of the result are the last beams. ``batch_size`` limits the number of prompts in
    a batch, not below one.

    Args:
        settings: fields of :class:`ChunkBeamSettings` and
            :class:`SearchSettings`; the rest as in
            :class:`SearchMethod`.
    """

    name: ClassVar[str] = "chunk_beam"
    settings_type = ChunkBeamSettings
    run_type = _Run
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
            **settings: Unpack[ChunkBeamOptions],
        ) -> None: ...

        def generate(  # type: ignore[override]
            self,
            prompts: Any,
            *,
            seed: int | torch.Generator | None = None,
            sequence: Sequence[int] | None = None,
            progress: Callable[[int], None] | None = None,
            **settings: Unpack[ChunkBeamOptions],
        ) -> SearchResult: ...

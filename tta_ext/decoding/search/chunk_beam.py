"""Chunk-level beam search by reward.

Each of b beams is continued in m ways by a chunk of L sampled tokens; the reward judges what is
there so far, finished or not; the best b go on. L = ``max_new_tokens`` is best-of-(b m).

Source: controlled decoding, blockwise (Mudgal et al., arXiv:2310.17022); chunk-level beam search
(Zhou et al., arXiv:2405.19262). The reward must make sense of unfinished answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import Unpack

from tta_ext import rng
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.search.base import Search, SearchMethod
from tta_ext.decoding.search.engine import LocalEngine, RolloutBatch, Scored
from tta_ext.decoding.search.outcome import Candidate, SearchResult
from tta_ext.decoding.search.ranges import check_range
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
        check_range(self, "at least 1", "beams", "branches", "chunk", "restarts")
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


class _Run(Search[ChunkBeamSettings]):
    def roll(self, active: list[int], count: int) -> Scored:
        settings = self.settings
        assert isinstance(self.engine, LocalEngine)
        rollouts = self.engine.rollouts(self.job([(p, j) for j in range(count) for p in active]))
        rows = rollouts.rows
        finished: dict[int, list[Candidate]] = {prompt: [] for prompt in active}
        first = self.iteration * settings.chunks
        for chunk in range(first, first + settings.chunks):
            rollouts.iteration = chunk
            before = [len(tokens) for tokens in rows.tokens]
            for _ in range(settings.chunk):
                if not rollouts.done:
                    rollouts.step()
            going = set(rows.active)
            texts = [
                self.scorer.ask(self.stream, cell, prompt, rows.tokens[cell])
                for cell, (prompt, _) in enumerate(rollouts.cells)
            ]
            rewards = self.stream.collect()
            # With the cell of each that goes on.
            pools: dict[int, list[tuple[Candidate, int | None]]] = {
                prompt: [(one, None) for one in finished[prompt]] for prompt in active
            }
            for cell, (prompt, rollout) in enumerate(rollouts.cells):
                tokens, finish = rows.tokens[cell], rows.finish[cell]
                self.tokens[prompt] += len(tokens) - before[cell]
                self.asked[prompt] += 1
                beam = Candidate(texts[cell], tokens, rewards[cell], chunk, rollout, finish)
                pools[prompt].append((beam, cell if cell in going else None))
            plan = []
            for prompt, pool in pools.items():
                # Stable: ties go to what finished first, then to the lowest rollout.
                kept = sorted(pool, key=lambda item: -item[0].reward)[: settings.beams]
                finished[prompt] = [beam for beam, cell in kept if cell is None]
                parents = [cell for _, cell in kept if cell is not None]
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
        for prompt, final in finished.items():
            final.sort(key=lambda beam: (beam.iteration, beam.rollout))
            # The answers themselves are counted when they are recorded.
            self.tokens[prompt] -= sum(len(beam.tokens) for beam in final)
            self.asked[prompt] -= len(final)
        return Scored(list(finished.values()), RolloutBatch())


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

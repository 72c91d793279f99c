"""Search by reward over whole answers: what its methods share.

:class:`SearchMethod` holds model, reward, tokenizer and settings; :meth:`SearchMethod.start` makes
a :class:`Search`, the state of one run over a batch of prompts, which advances an iteration at a
time: draw rollouts of every prompt, score them, remember the best. Best-of-n is this loop as it
stands; :mod:`aisp` adds noise and moves its mean between iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from tta_ext import rng
from tta_ext.decoding.deferral.kad import _logits_of, _seed
from tta_ext.decoding.rewards import Reward, RewardStream
from tta_ext.decoding.runtime.attention import check_model, probe_model
from tta_ext.decoding.runtime.prompts import encode_prompts, normalise_prompts
from tta_ext.decoding.runtime.stopping import StopStrings, end_ids
from tta_ext.decoding.runtime.vocabulary import align_vocabularies
from tta_ext.decoding.search.outcome import (
    Candidate,
    IterationRecord,
    SearchResult,
    Timing,
    best_of,
    spread,
)
from tta_ext.decoding.search.rollouts import Noise, PromptCache, Rollouts, Sampling

__all__ = ["Search", "SearchMethod", "SearchSettings"]


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
        Sampling(self.decoding, self.temperature, self.top_k, self.top_p, self.max_new_tokens)
        for name in ("batch_size", "reward_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds is {self.max_seconds}, expected more than 0")

    def schedule(self) -> list[int]:
        """Number of rollouts of each iteration."""
        raise TypeError(f"{type(self).__name__} has no iterations")

    def for_samples(self, samples: int) -> SearchSettings:
        """These settings, made to write about so many answers' worth of tokens a prompt."""
        raise TypeError(f"{type(self).__name__} has no number of samples")

    def for_seconds(self, seconds: float) -> SearchSettings:
        """These settings, made to go on until a time has passed."""
        raise TypeError(f"{type(self).__name__} has no iterations")


def check_samples(samples: int, least: int) -> int:
    """The number itself; ``ValueError`` if a method cannot do with so few."""
    if samples < least:
        raise ValueError(f"samples is {samples}, expected at least {least} with these settings")
    return samples


def check_counts(rollouts: int, iterations: int) -> None:
    """``ValueError`` unless the random streams have counters for so many."""
    if not 1 <= rollouts <= rng.ROLLOUTS:
        raise ValueError(f"n is {rollouts}, expected 1 to {rng.ROLLOUTS} rollouts an iteration")
    if not 1 <= iterations <= rng.ITERATIONS:
        raise ValueError(f"iterations is {iterations}, expected 1 to {rng.ITERATIONS}")


S = TypeVar("S", bound=SearchSettings)


class SearchMethod(Generic[S]):
    """A model, a reward and settings.

    Args:
        model: a ``transformers`` causal language model; put into evaluation mode.
        reward: ``(prompts, responses) -> floats``, see :mod:`tta_ext.decoding.rewards`.
        tokenizer: the model's tokenizer; without it prompts and responses are token ids.
        chat_template: overrides the tokenizer's.
        probe: run the model once on two short rows and refuse it if rows of different length cannot
            share its batch.
        settings: fields of the method's settings class.

    Raises:
        TypeError: not a causal language model, the reward is not callable, an unknown setting.
        ValueError: a model of a kind that cannot be used, a setting out of range.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Any]]

    def __init__(
        self,
        model: Any,
        reward: Reward,
        tokenizer: Any = None,
        *,
        chat_template: str | None = None,
        probe: bool = True,
        **settings: Any,
    ) -> None:
        check_model(model, "model")
        model.eval()
        RewardStream(reward)
        self.model, self.reward, self.tokenizer = model, reward, tokenizer
        self.chat_template = chat_template
        self.settings: S = self._merge(None, settings)
        size = _logits_of(model)
        self.vocabulary = align_vocabularies(
            size, size, tokenizer, tokenizer, proxy_name="the model"
        )
        if probe:
            probe_model(model, "model")

    def _merge(self, settings: S | None, changes: dict[str, Any]) -> S:
        known = {field.name for field in fields(self.settings_type)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no setting {unknown[0]!r}, expected some of "
                f"{', '.join(sorted(known))}"
            )
        if settings is None:
            return self.settings_type(**changes)
        return replace(settings, **changes)

    def start(
        self,
        prompts: Any,
        *,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | None = None,
        **settings: Any,
    ) -> Search[S]:
        """A run over a batch of prompts, to be advanced by :meth:`Search.step`.

        Args:
            prompts: a string, a conversation, a list of token ids, or a list of these.
            seed: an int, or a ``torch.Generator`` that supplies one; None takes one from torch's
                default generator.
            sequence: a 32-bit id for each prompt, which names its random streams; default 0, 1, ...
            settings: in place of the constructor's.
        """
        raise TypeError(f"{type(self).__name__} does not run in iterations")

    def run(self, prompts: Any, **options: Any) -> SearchResult:
        """The result of one batch of prompts; arguments as :meth:`start`."""
        search = self.start(prompts, **options)
        search.run()
        return search.result()

    def rows(self, settings: S) -> int:
        """Rows in flight for each prompt."""
        return max(settings.schedule())

    def generate(
        self,
        prompts: Any,
        *,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> SearchResult:
        """Answer prompts; with ``batch_size``, a group of them at a time.

        Args:
            prompts, seed, sequence, settings: as :meth:`start`.
            progress: called with the number of prompts done after each group.
        """
        listed = normalise_prompts(prompts)
        ids = list(range(len(listed))) if sequence is None else [int(i) for i in sequence]
        if len(ids) != len(listed):
            raise ValueError(f"sequence has {len(ids)} ids, expected {len(listed)}, one a prompt")
        merged = self._merge(self.settings, settings)
        seed = _seed(seed)
        group = len(listed) or 1
        if merged.batch_size is not None:
            group = max(1, merged.batch_size // self.rows(merged))
        parts = []
        for first in range(0, max(len(listed), 1), group):
            part = slice(first, first + group)
            parts.append(self.run(listed[part], seed=seed, sequence=ids[part], **settings))
            if progress is not None:
                progress(min(first + group, len(listed)))
        return SearchResult.concatenate(parts)


class Search(Generic[S]):
    """The state of one run.

    Args:
        method: model, reward and the rest.
        prompts: as for :meth:`SearchMethod.start`.
        settings: the method's settings with this run's changes.
        seed: 64-bit seed.
        sequence: a sequence id for each prompt, or None for 0, 1, ...

    Attributes:
        iteration: iterations done.
        candidates, curves, stopped: see :class:`SearchResult`;
            ``stopped`` is "" where the search goes on.
        tokens, asked: tokens generated and answers scored so far, for each prompt.
    """

    def __init__(
        self,
        method: SearchMethod[S],
        prompts: Any,
        settings: S,
        seed: int,
        sequence: Sequence[int] | None = None,
        encoded: Sequence[Sequence[int]] | None = None,
    ) -> None:
        begin = perf_counter()
        self.method, self.settings, self.seed = method, settings, seed
        self.prompts = normalise_prompts(prompts)
        count = len(self.prompts)
        self.sequence = list(range(count)) if sequence is None else [int(i) for i in sequence]
        if len(self.sequence) != count:
            raise ValueError(
                f"sequence has {len(self.sequence)} ids, expected {count}, one a prompt"
            )
        if encoded is None:
            encoded = encode_prompts(self.prompts, method.tokenizer, template=method.chat_template)
        self.encoded = [list(ids) for ids in encoded]
        _check_lengths(method.model, self.encoded, settings.max_new_tokens)
        self.schedule = settings.schedule()
        check_counts(max(self.schedule), len(self.schedule))
        stop = settings.stop_strings
        self.sampling = Sampling(
            settings.decoding,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.max_new_tokens,
            end_ids(settings.eos_token_id, [method.model], [method.tokenizer]),
            None if not stop else StopStrings(stop, method.tokenizer),
        )
        self.stream = RewardStream(method.reward, settings.reward_batch_size)
        self.streams = [self.stream]
        self.cache = PromptCache(method.model, self.encoded, self.sequence, method.vocabulary)
        self.seed_tensor = torch.tensor([seed], dtype=torch.int64, device=self.cache.device)
        self.iteration = 0
        self.candidates: list[list[Candidate]] = [[] for _ in self.prompts]
        self.curves: list[list[IterationRecord]] = [[] for _ in self.prompts]
        self.stopped = ["" for _ in self.prompts]
        self.tokens = [0] * count
        self.asked = [0] * count
        self._before = Timing()
        self._seconds = perf_counter() - begin

    # ---- the loop ----------------------------------------------------------------------------

    @property
    def active(self) -> list[int]:
        """Prompts whose search goes on."""
        return [p for p, why in enumerate(self.stopped) if not why]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.active

    @property
    def timing(self) -> Timing:
        """Wall-clock so far, runs before a resume included."""
        return self._before + Timing(
            total=self._seconds,
            model=self.cache.seconds,
            reward=sum(stream.seconds for stream in self.streams),
            reward_calls=sum(stream.calls for stream in self.streams),
            reward_items=sum(stream.items for stream in self.streams),
            tokens=sum(self.tokens) - self._before.tokens,
        )

    def run(self, callback: Callable[[Search[S]], None] | None = None) -> None:
        """Step until nothing is left to do, calling back after each iteration."""
        while not self.done:
            self.step()
            if callback is not None:
                callback(self)

    @torch.inference_mode()
    def step(self) -> None:
        """One iteration of every prompt that goes on."""
        begin = perf_counter()
        active = self.active
        if not active:
            return
        if self.iteration >= len(self.schedule):
            for prompt in active:
                self.stopped[prompt] = "iterations"
            return
        count = self.schedule[self.iteration]
        batch = self._roll(active, count)
        extra = self.update(active, batch)
        self._seconds += perf_counter() - begin
        elapsed = self.timing.total
        for place, prompt in enumerate(active):
            self._record(prompt, batch.candidates[place], elapsed, extra[place])
        self.iteration += 1
        limit = self.settings.max_seconds
        for prompt in active:
            if not self.stopped[prompt]:
                if self.iteration == len(self.schedule):
                    self.stopped[prompt] = "iterations"
                elif limit is not None and elapsed >= limit:
                    self.stopped[prompt] = "seconds"

    def noise(self) -> Noise | None:
        """Noise of the coming iteration."""
        return None

    @property
    def metered(self) -> int:
        """Rollouts a prompt whose divergence is measured."""
        return 0

    def update(self, active: list[int], batch: Scored) -> list[dict[str, Any]]:
        """Learn from an iteration; for each active prompt, fields of its record."""
        return [{} for _ in active]

    def rollouts(self, cells: Sequence[tuple[int, int]]) -> Rollouts:
        """A batch of this iteration's rollouts."""
        return Rollouts(
            self.cache,
            cells,
            sampling=self.sampling,
            seed=self.seed_tensor,
            iteration=self.iteration,
            noise=self.noise(),
            metered=self.metered,
        )

    def _roll(self, active: list[int], count: int) -> Scored:
        """Draw and score ``count`` rollouts of each active prompt."""
        settings = self.settings
        cells = [(prompt, rollout) for rollout in range(count) for prompt in active]
        size = len(cells) if settings.batch_size is None else settings.batch_size
        scored = Scored(active, count, self.cache.device)
        place = {prompt: i for i, prompt in enumerate(active)}
        texts: dict[tuple[int, int], Any] = {}
        finished: dict[tuple[int, int], tuple[list[int], str]] = {}
        for first in range(0, len(cells), size):
            rollouts = self.rollouts(cells[first : first + size])

            def on_finish(number: int, rollouts: Rollouts = rollouts) -> None:
                cell = rollouts.cells[number]
                tokens = rollouts.tokens[number]
                finished[cell] = (tokens, rollouts.finish[number])
                texts[cell] = self.text(tokens)
                response = tokens if texts[cell] is None else texts[cell]
                self.stream.put(cell, self.prompts[cell[0]], response)

            rollouts.run(on_finish)
            for number, (prompt, rollout) in enumerate(rollouts.cells):
                scored.length[place[prompt]][rollout] = len(rollouts.tokens[number])
            rows = torch.tensor([place[prompt] for prompt, _ in rollouts.cells])
            columns = torch.tensor([rollout for _, rollout in rollouts.cells])
            scored.dot[rows, columns] = rollouts.dot
            scored.common_dot[rows, columns] = rollouts.common_dot
            for number, value in rollouts.kl.items():
                scored.kl[place[rollouts.cells[number][0]]].append(value)
        rewards = self.stream.collect()
        for prompt in active:
            scored.candidates.append(
                [
                    Candidate(
                        texts[prompt, i],
                        finished[prompt, i][0],
                        rewards[prompt, i],
                        self.iteration,
                        i,
                        finished[prompt, i][1],
                    )
                    for i in range(count)
                ]
            )
        return scored

    def text(self, tokens: Sequence[int]) -> str | None:
        """An answer's text; None without a tokenizer."""
        tokenizer = self.method.tokenizer
        if tokenizer is None:
            return None
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text if self.sampling.stop is None else self.sampling.stop.cut(text)

    def _record(
        self, prompt: int, candidates: list[Candidate], elapsed: float, extra: dict[str, Any]
    ) -> None:
        self.candidates[prompt] += candidates
        self.tokens[prompt] += sum(len(one.tokens) for one in candidates)
        self.asked[prompt] += len(candidates)
        best = best_of(self.candidates[prompt]).reward
        mean, highest, deviation = spread([one.reward for one in candidates])
        self.curves[prompt].append(
            IterationRecord(
                iteration=self.iteration,
                samples=self.asked[prompt],
                mean=mean,
                max=highest,
                std=deviation,
                best=best,
                length=sum(len(one.tokens) for one in candidates) / len(candidates),
                distinct=len({tuple(one.tokens) for one in candidates}),
                tokens=self.tokens[prompt],
                seconds=elapsed,
                **extra,
            )
        )
        target = self.settings.reward_target
        if target is not None and best >= target:
            self.stopped[prompt] = "reward"

    def choose(self, prompt: int) -> Candidate:
        """The answer to give for a prompt."""
        return best_of(self.candidates[prompt])

    def result(self) -> SearchResult:
        """What the run has found so far; at least one iteration must be done."""
        if self.prompts and not self.iteration:
            raise ValueError("the search has done no iteration yet; call step() or run() first")
        return SearchResult(
            method=self.method.name,
            prompts=self.prompts,
            best=[self.choose(prompt) for prompt in range(len(self.prompts))],
            candidates=[list(found) for found in self.candidates],
            curves=[list(curve) for curve in self.curves],
            stopped=list(self.stopped),
            seed=self.seed,
            sequence=self.sequence,
            timing=self.timing,
        )

    def __iter__(self) -> Iterator[Search[S]]:
        """Advance, one iteration at a time."""
        while not self.done:
            self.step()
            yield self


class Scored:
    """The rollouts of one iteration, by active prompt.

    Attributes:
        candidates: for each active prompt, its rollouts in order.
        length: number of tokens of each.
        dot: float32 ``[active, count]``, sum of u . eps of each.
        common_dot: the same of the noise's common part.
        kl: measured divergences of each prompt's metered rollouts.
    """

    def __init__(self, active: Sequence[int], count: int, device: torch.device) -> None:
        self.candidates: list[list[Candidate]] = []
        self.length = [[0] * count for _ in active]
        self.dot = torch.zeros(len(active), count, dtype=torch.float32, device=device)
        self.common_dot = torch.zeros_like(self.dot)
        self.kl: list[list[float]] = [[] for _ in active]

    def lengths(self) -> Tensor:
        """int64 ``[active, count]``."""
        return torch.tensor(self.length, dtype=torch.int64, device=self.dot.device)

    def rewards(self) -> Tensor:
        """float32 ``[active, count]``; finite rewards beyond float32 are its largest number."""
        values = [[one.reward for one in row] for row in self.candidates]
        limit = torch.finfo(torch.float32).max
        return torch.tensor(
            [[v if v == -math.inf else min(max(v, -limit), limit) for v in row] for row in values],
            dtype=torch.float32,
            device=self.dot.device,
        )


def _check_lengths(model: Any, prompts: Sequence[Sequence[int]], room: int) -> None:
    """Ids without an embedding, and contexts without positions."""
    size = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        wrong = next((i for i in prompt if not 0 <= i < size), None)
        if wrong is not None:
            raise ValueError(f"prompt {row} has the id {wrong}, expected ids from 0 to {size - 1}")
        if limit and len(prompt) + room - 1 > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens is {room}, "
                f"but the model has only {limit} positions"
            )

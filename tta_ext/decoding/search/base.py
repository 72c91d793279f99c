"""Search by reward over whole answers: what its methods share.

:class:`SearchMethod` holds model, reward, tokenizer and settings; :meth:`SearchMethod.start` makes
a :class:`Search`, the state of one run over a batch of prompts, which advances an iteration at a
time: draw rollouts of every prompt, score them, remember the best. Best-of-n is this loop as it
stands; :mod:`aisp` adds noise and moves its mean between iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from time import perf_counter
from typing import Any, ClassVar, Generic, TypeVar

import torch
from typing_extensions import Self

from tta_ext import rng
from tta_ext.decoding.rewards import Reward, check_reward
from tta_ext.decoding.runtime.attention import check_model
from tta_ext.decoding.runtime.fit import fit_model
from tta_ext.decoding.runtime.loading import LoadingOptions, load_model, load_tokenizer
from tta_ext.decoding.runtime.models import class_name, logit_count, refuse_path
from tta_ext.decoding.runtime.prompts import (
    check_prompts,
    encode_prompts,
    normalise_prompts,
    sequence_ids,
)
from tta_ext.decoding.runtime.signatures import keywords_of
from tta_ext.decoding.runtime.stopping import StopStrings, end_ids
from tta_ext.decoding.runtime.views import as_model
from tta_ext.decoding.runtime.vocabulary import align_vocabularies
from tta_ext.decoding.search.engine import (
    EngineFactory,
    LocalEngine,
    RolloutEngine,
    RolloutJob,
    RolloutTask,
    Scored,
    Scorer,
    engine_of,
)
from tta_ext.decoding.search.outcome import (
    Candidate,
    IterationRecord,
    SearchResult,
    Timing,
    best_of,
    spread,
)
from tta_ext.decoding.search.settings import SearchSettings

__all__ = ["Scored", "Search", "SearchMethod"]

S = TypeVar("S", bound=SearchSettings)


class SearchMethod(Generic[S]):
    """A model, a reward and settings.

    Args:
        model: a ``transformers`` causal language model; put into evaluation mode.
        reward: ``(prompts, responses) -> floats``, see :mod:`tta_ext.decoding.rewards`.
        tokenizer: the model's tokenizer; without it prompts and responses are token ids.
        chat_template: overrides the tokenizer's.
        probe: try the model on two short rows, to learn whether rows of different length can share
            its batch.
        runner: ``"ragged"`` or ``"lockstep"``; None chooses by what the model is.
        engine, workers: what draws the rollouts: the model here; ``"ray"``, with so many workers
            (1); or any ``(model, task) -> RolloutEngine`` (:mod:`~tta_ext.decoding.search.engine`).
        settings: fields of the method's settings class.

    Raises:
        TypeError: not a causal language model, the reward is not callable, an unknown setting.
        ValueError: a model of a kind that cannot be used, a setting out of range.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Any]]
    run_type: ClassVar[type[Any]]
    # Works on rollouts token by token, which only the engine of this process has.
    stepwise: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Spell the settings out in the signatures that ``help()`` and editors show."""
        super().__init_subclass__(**kwargs)
        if "settings_type" in cls.__dict__:
            for name in ("__init__", "start", "generate"):
                setattr(cls, name, keywords_of(cls.settings_type)(getattr(cls, name)))

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
        **settings: Any,
    ) -> None:
        refuse_path(model, "model", type(self).__name__)
        model = as_model(model, "model")
        check_model(model, "model")
        model.eval()
        check_reward(reward)
        if self.stepwise and engine is not LocalEngine:
            raise ValueError(
                f"{type(self).__name__} looks at rollouts token by token; it takes no engine"
            )
        self.engine = engine_of(engine, workers)
        self.model, self.reward, self.tokenizer = model, reward, tokenizer
        self.chat_template = chat_template
        self.settings: S = self._merge(None, settings)
        size = logit_count(model)
        self.vocabulary = align_vocabularies(
            size, size, tokenizer, tokenizer, proxy_name="the model"
        )
        self.fit = fit_model(model, "model", runner, probe, tokenizer)

    def __repr__(self) -> str:
        model = f"{class_name(self.model)} ({self.fit.kind})"
        return f"{type(self).__name__}({model}, {self.settings!r})"

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        reward: Reward,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Load a model and its tokenizer (safetensors or GGUF).

        Args:
            model: a folder, a ``.gguf`` file or a hub name.
            reward: the reward, as the constructor's.
            dtype: dtype of the weights; ``"auto"`` keeps the file's.
            device: where the model goes; None leaves it on the CPU.
            options: ``device_map``, ``attn_implementation``, ``quantization_config``, ``revision``
                and the other :class:`~tta_ext.decoding.runtime.loading.LoadingOptions` go to
                transformers, the rest to the constructor.
        """
        check_reward(reward)
        loading: Any = {k: options.pop(k) for k in LoadingOptions.__annotations__ if k in options}
        loaded = load_model(model, dtype=dtype, device=device, **loading)
        return cls(loaded, reward, load_tokenizer(model, **loading), **options)

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
        return self.run_type(
            self, prompts, self._merge(self.settings, settings), rng.resolve_seed(seed), sequence
        )

    def run(self, prompts: Any, **options: Any) -> SearchResult:
        """The result of one batch of prompts; arguments as :meth:`start`."""
        search = self.start(prompts, **options)
        search.run()
        return search.result()

    def encode(self, prompts: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
        """Token ids of prompts, checked."""
        encoded = encode_prompts(prompts, self.tokenizer, template=self.chat_template)
        check_prompts(self.model, encoded, max_new_tokens)
        return encoded

    @staticmethod
    def rows(settings: Any) -> int:
        """Rows in flight for each prompt, of a method with such settings."""
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
        ids = sequence_ids(sequence, len(listed))
        merged = self._merge(self.settings, settings)
        seed = rng.resolve_seed(seed)
        group = len(listed) or 1
        if merged.batch_size is not None:
            group = max(1, merged.batch_size // self.rows(merged))
        if self.fit.reach is not None and len(listed) > 1:
            longest = max(map(len, self.encode(listed, merged.max_new_tokens)))
            if self.fit.apart(longest + merged.max_new_tokens):
                group = 1  # prompts of different length would disturb each other
        if group < len(listed):
            # All are checked before hours go into the first group; a single group checks its own.
            self.encode(listed, merged.max_new_tokens)
        parts = []
        for first in range(0, max(len(listed), 1), group):
            part = slice(first, first + group)
            search = self.run_type(self, listed[part], merged, seed, ids[part], first)
            search.run()
            parts.append(search.result())
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
        first: what messages call the first prompt.

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
        first: int = 0,
    ) -> None:
        begin = perf_counter()
        self.method, self.settings, self.seed = method, settings, seed
        self.prompts = normalise_prompts(prompts)
        count = len(self.prompts)
        self.sequence = sequence_ids(sequence, count)
        self.encoded = method.encode(self.prompts, settings.max_new_tokens)
        self.schedule = settings.schedule()
        stop = settings.stop_strings
        self.sampling = settings.sampling(
            end_ids(settings.eos_token_id, [method.model], [method.tokenizer]),
            StopStrings.of(stop, method.tokenizer),
        )
        self.scorer = Scorer(
            self.prompts,
            method.reward,
            method.tokenizer,
            self.sampling.stop,
            settings.reward_batch_size,
        )
        self.stream = self.scorer.stream()
        self.streams = [self.stream]
        task = RolloutTask(
            self.encoded, self.sequence, self.sampling, seed, method.vocabulary,
            settings.batch_size, first, method.fit, self.scorer,
        )  # fmt: skip
        self.engine = self.open(task)
        self.iteration = 0
        self.candidates: list[list[Candidate]] = [[] for _ in self.prompts]
        self.curves: list[list[IterationRecord]] = [[] for _ in self.prompts]
        self.stopped = ["" for _ in self.prompts]
        self.tokens = [0] * count
        self.asked = [0] * count
        self._before = Timing()
        self._seconds = perf_counter() - begin

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: {len(self.prompts)} prompts, {len(self.active)} active, "
            f"iteration {self.iteration} of {len(self.schedule)}, {sum(self.asked)} answers scored>"
        )

    @property
    def training(self) -> int:
        """Answers that were drawn and scored to train what the search uses."""
        return 0

    def open(self, task: RolloutTask) -> RolloutEngine:
        """What draws this run's rollouts."""
        return self.method.engine(self.method.model, task)

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
            model=self.engine.seconds,
            reward=sum(stream.seconds for stream in self.streams),
            reward_calls=sum(stream.calls for stream in self.streams),
            reward_items=sum(stream.items for stream in self.streams),
            tokens=sum(self.tokens) - self._before.tokens,
        )

    def run(self, callback: Callable[[Search[S]], None] | None = None) -> None:
        """Step until nothing is left to do, calling back after each iteration."""
        for _ in self:
            if callback is not None:
                callback(self)

    def __iter__(self) -> Iterator[Search[S]]:
        """Advance, one iteration at a time."""
        while not self.done:
            self.step()
            yield self

    @torch.inference_mode()
    def step(self) -> None:
        """One iteration of every prompt that goes on."""
        begin, active = perf_counter(), self.active
        if active and self.iteration < len(self.schedule):
            scored = self.roll(active, self.schedule[self.iteration])
            extra = self.update(active, scored)
            self._seconds += perf_counter() - begin
            for prompt, found, more in zip(active, scored.candidates, extra, strict=True):
                self._record(prompt, found, more)
            self.iteration += 1
        limit = self.settings.max_seconds
        for prompt in self.active:
            if self.iteration >= len(self.schedule):
                self.stopped[prompt] = "iterations"
            elif limit is not None and self.timing.total >= limit:
                self.stopped[prompt] = "seconds"

    def update(self, active: list[int], scored: Scored) -> list[dict[str, Any]]:
        """Learn from an iteration; for each active prompt, fields of its record."""
        return [{} for _ in active]

    def job(self, cells: Sequence[tuple[int, int]]) -> RolloutJob:
        """This iteration's rollouts, as an engine takes them."""
        return RolloutJob(cells, self.iteration)

    def roll(self, active: list[int], count: int) -> Scored:
        """Draw and score ``count`` rollouts of each active prompt."""
        cells = [(prompt, rollout) for rollout in range(count) for prompt in active]
        texts: dict[int, str | None] = {}

        def on_finish(number: int, tokens: list[int]) -> None:
            texts[number] = self.scorer.ask(self.stream, number, cells[number][0], tokens)

        batch = self.engine.roll(self.job(cells), on_finish)
        if batch.scores is not None:
            said, rewarded, seconds, calls = batch.scores
            texts |= enumerate(said)
            self.stream.take(rewarded, seconds, calls)
        rewards = self.stream.collect()
        found = [
            Candidate(texts[i], tokens, rewards[i], self.iteration, rollout, finish)
            for i, ((_, rollout), tokens, finish) in enumerate(
                zip(cells, batch.tokens, batch.finish, strict=True)
            )
        ]
        return Scored([found[place :: len(active)] for place in range(len(active))], batch)

    def _record(self, prompt: int, candidates: list[Candidate], extra: dict[str, Any]) -> None:
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
                seconds=self.timing.total,
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
            training=self.training,
        )

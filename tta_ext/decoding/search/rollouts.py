"""Rollouts: many answers to the same prompts, drawn together, with noise on the pre-logits.

The prompts are run once (:class:`PromptCache`); every iteration copies their keys and values to the
rows of its rollouts. Only a prompt's last token is run again, one row a prompt: the hook before the
language-model head turns its pre-logits into one row a rollout. The head is called by the model
itself, so whatever the model does to its logits afterwards (soft-capping, scaling) stays in force.

Rows lie in the ragged cache (:mod:`cache`): positions are explicit, nothing is
padded, finished rollouts leave the batch. Every random number is keyed by seed, prompt, iteration,
rollout and position, so a rollout does not depend on its neighbours, apart from the model's own
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper

from tta_ext import ops, rng
from tta_ext.decoding.runtime.cache import RaggedLayer
from tta_ext.decoding.runtime.profiling import span
from tta_ext.decoding.runtime.runner import Runner
from tta_ext.decoding.runtime.stopping import StopStrings
from tta_ext.decoding.runtime.vocabulary import Vocabulary

__all__ = ["DECODING", "Noise", "PromptCache", "Rollouts", "Sampling", "restrict"]

DECODING = ("sample", "greedy")


@dataclass(frozen=True)
class Sampling:
    """How a rollout's tokens come out of its logits, and when it ends.

    Attributes:
        decoding: ``"sample"`` draws each token; ``"greedy"`` takes the most probable one, so that
            rollouts differ by their noise alone.
        temperature: of the draw; > 0.
        top_k: draw from the k most probable tokens (and those tied with the last); None: from all.
        top_p: draw from the smallest set of most probable tokens with at least this mass.
        max_new_tokens: tokens after which a rollout ends.
        ends: ids that end it.
        stop: stop strings that end it.
    """

    decoding: str = "sample"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 64
    ends: frozenset[int] = frozenset()
    stop: StopStrings | None = None

    def __post_init__(self) -> None:
        if self.decoding not in DECODING:
            raise ValueError(
                f"decoding is {self.decoding!r}, expected one of {', '.join(DECODING)}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature!r}, expected a finite number > 0 "
                "(for the most probable token take decoding='greedy')"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")


@dataclass
class Noise:
    """Gaussian noise on pre-logits.

    Attributes:
        mean: u, float32 ``[P, tau, d]``; with ``common``, ``[P, 1 + tau, d]``.
        sigma: standard deviation of each step's own noise.
        common: standard deviation of a second draw that is the same at all of a rollout's steps
            below tau; 0 is none. Row 0 of the mean is then this part's, row 1 + t that of step t,
            and the random streams are numbered like the rows.
    """

    mean: Tensor
    sigma: float
    common: float = 0.0


def restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits with -inf for the tokens that top-k and top-p leave out.

    Args:
        logits: ``[rows, V]``.
        temperature: at which ``top_p`` measures mass.
        top_k, top_p: as in :class:`Sampling`; both may be None. Top-k comes first.
    """
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    # Not TopPLogitsWarper: of equal logits it keeps the last or any, here the first stay.
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.float().sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered / temperature, dim=-1)
        # A token goes if those before it have the mass already; the first always stays.
        gone = p.cumsum(-1) - p >= top_p
        gone[..., 0] = False
        logits = logits.masked_fill(gone.scatter(-1, order, gone), float("-inf"))
    return logits


class PromptCache:
    """Prompts that are run once and continued many times.

    Args:
        model: a causal language model that :func:`check_model` accepts.
        prompts: token ids of each prompt.
        sequence: sequence id of each prompt's random streams.
        vocabulary: the ids that may be drawn.

    Attributes:
        count: number of prompts.
        dimensions: size d of the pre-logits.
        seconds: time in the model so far, without what the hook before its head does.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sequence: Sequence[int],
        vocabulary: Vocabulary,
    ) -> None:
        self.model, self.sequence = model, list(sequence)
        self.head = model.get_output_embeddings()
        self.dimensions: int = self.head.weight.shape[1]
        self.prompts = [list(prompt) for prompt in prompts]
        self.count = len(self.prompts)
        device = model.get_input_embeddings().weight.device
        masked = torch.tensor(vocabulary.masked, device=device) if vocabulary.masked else None
        with torch.inference_mode():
            self.runner = Runner(
                model, self.prompts, room=0, vocabulary=vocabulary.size, masked=masked, name="model"
            )
            self._rows = _Rows(
                model, [], room=0, vocabulary=vocabulary.size, masked=masked, name="model"
            )
            self.runner.prefill()
        self.device = self.runner.device
        self.hook_seconds = 0.0

    @property
    def seconds(self) -> float:
        return self.runner.seconds + self._rows.seconds - self.hook_seconds

    def rows(self, prompt: Sequence[int], room: int) -> _Rows:
        """Rows that continue these prompts (numbers, repeated as needed), their caches filled.

        There is one set of rows: those handed out before become invalid.
        """
        self._rows.restart(self.runner, prompt, room)
        return self._rows


class _Rows(Runner):
    """The rows of a batch of rollouts."""

    def restart(self, source: Runner, rows: Sequence[int], room: int) -> None:
        """Take over the tokens and the caches of some rows of ``source``, all of them cached."""
        self._load([source.tokens(row) for row in rows], room)
        width = max(self._total, default=0)
        self._make_room(width)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        layers = self.cache.ragged
        for place, theirs in enumerate(source.cache.ragged):
            while len(layers) <= place:
                layers.append(RaggedLayer(self.cache))
            mine = layers[place]
            if not mine.is_initialized:
                mine.lazy_initialization(
                    theirs.key_view[:1].transpose(1, 2), theirs.value_view[:1].transpose(1, 2)
                )
            mine.key_view[:, :width] = theirs.key_view[:, :width].index_select(0, index)
            mine.value_view[:, :width] = theirs.value_view[:, :width].index_select(0, index)
        self._cached = self._total.copy()

    def reorder(self, rows: Sequence[int]) -> None:
        """Make row i a copy of what row ``rows[i]`` is now; not more rows than at the start."""
        if rows:
            source = torch.tensor(rows, dtype=torch.int64, device=self.device)
            target = torch.arange(len(rows), device=self.device)
            self.cache.copy_rows(source, target, max(self._cached[row] for row in rows))
        self._tokens = [self._tokens[row].copy() for row in rows]
        self._prompt = [self._prompt[row] for row in rows]
        self._total = [self._total[row] for row in rows]
        self._cached = [self._cached[row] for row in rows]
        self._group = list(range(len(rows)))
        self.count = len(rows)
        self._place()


class Rollouts:
    """A batch of rollouts in flight.

    Args:
        prompts: the prompts they continue.
        cells: (prompt, rollout) of each.
        sampling: how tokens are drawn and when a rollout ends.
        seed: int64 ``[1]`` on the prompts' device.
        iteration: counter of the random streams.
        noise: what is added to the pre-logits; None leaves them alone.
        metered: KL divergence from the base model is measured on rollouts 0 to ``metered - 1`` of
            each prompt, at the price of as many more rows in the head.

    Attributes:
        active: cells that go on, by number, in the order of the rows.
        tokens: ids of each cell's answer so far.
        finish: why each cell ended: ``"eos"``, ``"stop"``, ``"length"``; "" while it goes on.
        dot: float32 ``[cells]``, sum over the steps of u . eps; complete when all have finished.
        common_dot: the same of the noise's common part, which counts once.
        kl: for each metered cell, the divergence of its next-token laws from the base model's, both
            at the sampling temperature and before top-k and top-p, summed over its steps.
    """

    def __init__(
        self,
        prompts: PromptCache,
        cells: Sequence[tuple[int, int]],
        *,
        sampling: Sampling,
        seed: Tensor,
        iteration: int = 0,
        noise: Noise | None = None,
        metered: int = 0,
    ) -> None:
        self.prompts, self.cells = prompts, list(cells)
        self.sampling, self.seed, self.iteration = sampling, seed, iteration
        self.noise = noise
        count, device = len(self.cells), prompts.device
        self.active = list(range(count))
        self.tokens: list[list[int]] = [[] for _ in self.cells]
        self.finish = [""] * count
        self.dot = torch.zeros(count, dtype=torch.float32, device=device)
        self.common_dot = torch.zeros(count, dtype=torch.float32, device=device)
        self.kl: dict[int, float] = {}
        if noise is not None:
            self.kl = {i: 0.0 for i, (_, rollout) in enumerate(self.cells) if rollout < metered}

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        self._prompt = column([prompt for prompt, _ in self.cells])
        self._rollout = column([rollout for _, rollout in self.cells])
        self._sequence = column([prompts.sequence[prompt] for prompt, _ in self.cells])
        self._position = column([len(prompts.prompts[prompt]) for prompt, _ in self.cells])
        self._token = torch.empty(count, dtype=torch.int64, device=device)
        self._dot = torch.zeros(count, dtype=torch.float32, device=device)
        self._rows: _Rows | None = None
        self._step = 0
        self._fired = False
        self._arrange()

    def _arrange(self) -> None:
        """What depends on which cells are active."""
        self._meter = [row for row, cell in enumerate(self.active) if cell in self.kl]
        self._meter_index = torch.tensor(self._meter, dtype=torch.int64, device=self.prompts.device)

    @property
    def done(self) -> bool:
        """Whether every rollout has ended."""
        return not self.active

    # ---- logits ------------------------------------------------------------------------------

    def _before_head(self, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the head: one row a rollout, plus noise, plus metered base rows."""
        start = perf_counter()
        self._fired = True
        hidden = arguments[0][:, -1]
        if self._rows is None:
            hidden = hidden.index_select(0, self._prompt)
        base = hidden.index_select(0, self._meter_index) if self._meter else None
        if self.noise is not None:
            with span("perturb"):
                hidden = self._perturbed(hidden, self.noise)
        if base is not None:
            hidden = torch.cat((hidden, base))
        self.prompts.hook_seconds += perf_counter() - start
        return (hidden.unsqueeze(1), *arguments[1:])

    def _perturbed(self, hidden: Tensor, noise: Noise) -> Tensor:
        """The pre-logits with the step's noise."""

        def add(hidden: Tensor, row: int, sigma: float, dot: Tensor | None) -> Tensor:
            return ops.prelogit_perturb(
                hidden,
                noise.mean,
                step=row,
                row=self._prompt,
                sequence=self._sequence,
                rollout=self._rollout,
                iteration=self.iteration,
                sigma=sigma,
                seed=self.seed,
                dot=dot,
            )

        if noise.common == 0.0:
            return add(hidden, self._step, noise.sigma, self._dot)
        if self._step + 1 >= noise.mean.shape[1]:
            return hidden
        # At the first step every cell is active, in order.
        first = self.common_dot if self._step == 0 else None
        dtype = hidden.dtype
        # In float32 between the two, so that the sum is rounded once.
        hidden = add(hidden.float(), 0, noise.common, first)
        return add(hidden, self._step + 1, noise.sigma, self._dot).to(dtype)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits ``[active, V]`` of every active rollout's next token, under the noise."""
        self._fired = False
        handle = self.prompts.head.register_forward_pre_hook(self._before_head)
        try:
            logits = (self.prompts.runner if self._rows is None else self._rows).step()
        finally:
            handle.remove()
        if not self._fired:
            raise ValueError(
                f"{type(self.prompts.model).__name__} does not call its output embeddings as a "
                "module, so its pre-logits cannot be changed"
            )
        if self._meter:
            rows = len(self.active)
            self._measure(logits[:rows], logits[rows:])
            logits = logits[:rows]
        return logits

    def _measure(self, logits: Tensor, base: Tensor) -> None:
        """Add the step's divergences."""
        temperature = self.sampling.temperature
        log_p = torch.log_softmax(
            logits.index_select(0, self._meter_index).float() / temperature, dim=-1
        )
        log_q = torch.log_softmax(base.float() / temperature, dim=-1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).tolist()
        for row, value in zip(self._meter, terms, strict=True):
            self.kl[self.active[row]] += value

    # ---- tokens ------------------------------------------------------------------------------

    def draw(self, logits: Tensor) -> Tensor:
        """The next token of every active rollout, int64 ``[active]``; overwritten by the next."""
        sampling = self.sampling
        cut = sampling.top_k is not None or sampling.top_p is not None
        if cut and sampling.decoding != "greedy":
            logits = restrict(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        return self.pick(logits, sampling, out=self._token)

    def pick(
        self, scores: Tensor, sampling: Sampling, stream: int = rng.BASE, out: Tensor | None = None
    ) -> Tensor:
        """An index of each active rollout's scores: the highest, or drawn under its own key."""
        if sampling.decoding == "greedy":
            return ops.categorical_sample(scores, do_sample=False, out=out)
        return ops.categorical_sample(
            scores,
            temperature=sampling.temperature,
            seed=self.seed,
            position=self._position,
            sequence=self._sequence,
            iteration=self.iteration,
            rollout=self._rollout,
            stream=stream,
            out=out,
        )

    @torch.inference_mode()
    def commit(self, token: Tensor) -> list[int]:
        """Append a token to every active rollout; the cells that ended with it."""
        values = token.tolist()
        finished = []
        for row, (cell, value) in enumerate(zip(self.active, values, strict=True)):
            if value < 0:
                # On CUDA the ops do not raise, they mark the row.
                prompt, rollout = self.cells[cell]
                raise ValueError(
                    f"the logits of prompt {prompt}, rollout {rollout} have NaN or +inf, or no "
                    "finite value"
                )
            self.tokens[cell].append(value)
            self.finish[cell] = self._why(cell, value)
            if self.finish[cell]:
                finished.append(row)
        ended = [self.active[row] for row in finished]
        self._step += 1
        self._position += 1
        if len(finished) < len(values) and self._rows is None:
            self._rows = self.prompts.rows(
                [self.cells[cell][0] for cell in self.active], self.sampling.max_new_tokens
            )
        if self._rows is not None:
            self._rows.append(values, token)
        if finished:
            self._drop(finished)
        return ended

    def _why(self, cell: int, token: int) -> str:
        sampling = self.sampling
        if token in sampling.ends:
            return "eos"
        if sampling.stop is not None and sampling.stop(self.tokens[cell]):
            return "stop"
        return "length" if len(self.tokens[cell]) >= sampling.max_new_tokens else ""

    def _drop(self, finished: list[int]) -> None:
        gone = set(finished)
        kept = [row for row in range(len(self.active)) if row not in gone]
        left = torch.tensor(finished, device=self._dot.device)
        cells = torch.tensor([self.active[row] for row in finished], device=self._dot.device)
        self.dot[cells] = self._dot[left]
        self.active = [self.active[row] for row in kept]
        if self._rows is not None and kept:
            self._rows.keep(kept)
        self._select(kept)

    def _select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(list(rows), dtype=torch.int64, device=self._dot.device)
        for name in ("_prompt", "_rollout", "_sequence", "_position", "_dot"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        self._token = torch.empty(len(index), dtype=torch.int64, device=index.device)
        self._arrange()

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Draw a token for every active rollout; the cells that ended with it."""
        return self.commit(self.draw(self.logits()))

    def run(self, on_finish: Callable[[int], None] | None = None) -> None:
        """Step until every rollout has ended, naming each as it does."""
        while self.active:
            for cell in self.step():
                if on_finish is not None:
                    on_finish(cell)

    @torch.inference_mode()
    def branch(self, cells: Sequence[tuple[int, int]], parents: Sequence[int]) -> None:
        """Replace all rollouts by continuations of some of those that are active.

        Args:
            cells: (prompt, rollout) of the new rollouts, no more than there were at the start.
            parents: for each, the number of the active cell that it continues.
        """
        place = {cell: row for row, cell in enumerate(self.active)}
        rows = [place[parent] for parent in parents]
        if self._rows is not None:
            self._rows.reorder(rows)
        self.tokens = [self.tokens[parent].copy() for parent in parents]
        self.cells, self.finish = list(cells), [""] * len(rows)
        self.active = list(range(len(rows)))
        self.dot = torch.zeros(len(rows), dtype=torch.float32, device=self._dot.device)
        self._select(rows)
        self._rollout = torch.tensor(
            [rollout for _, rollout in cells], dtype=torch.int64, device=self._dot.device
        )

"""Rollouts: many answers to the same prompts, drawn together, with noise on the pre-logits.

The prompts are run once (:class:`PromptCache`); every iteration copies their keys and values to the
rows of its rollouts. Only a prompt's last token is run again, one row a prompt: the hook before the
language-model head turns its pre-logits into one row a rollout. The head is called by the model
itself, so whatever the model does to its logits afterwards (soft-capping, scaling) stays in force.

Rows lie in the ragged cache (``runtime/cache.py``): positions are explicit, nothing is padded,
finished rollouts leave the batch. Every random number is keyed by seed, prompt, iteration, rollout
and position, so a rollout does not depend on its neighbours, apart from the model's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from threading import get_ident
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.runtime.fit import Fit
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.models import class_name, head_inputs, loaded
from tta_ext.decoding.runtime.profiling import span
from tta_ext.decoding.runtime.rows import Rows
from tta_ext.decoding.runtime.vocabulary import Vocabulary
from tta_ext.decoding.search.sampling import Noise, Sampling, restrict

__all__ = ["PromptCache", "Rollouts"]


class PromptCache:
    """Prompts that are run once and continued many times.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        sequence: sequence id of each prompt's random streams.
        vocabulary: the ids that may be drawn.
        fit: how the model is run.
        room: tokens that follow a prompt at most.
        first: what messages call the first prompt.

    Attributes:
        dimensions: size d of the pre-logits.
        seconds: time in the model so far, without what the hook before its head does.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sequence: Sequence[int],
        vocabulary: Vocabulary,
        fit: Fit,
        room: int,
        first: int = 0,
    ) -> None:
        self.model, self.sequence, self.first = model, list(sequence), first
        self.head = model.get_output_embeddings()
        self.dimensions = head_inputs(model)
        self.prompts = [list(prompt) for prompt in prompts]
        tokens = max(map(len, self.prompts), default=0) + room
        if fit.apart(tokens) and len({len(prompt) for prompt in self.prompts}) > 1:
            raise ValueError(
                f"prompts of different length would disturb each other in {class_name(model)}; "
                "search one at a time, as generate() does"
            )
        with torch.inference_mode():
            self._make = partial(
                fit.runner,
                model,
                room=0,
                vocabulary=vocabulary.size,
                masked=vocabulary.masked,
                tokens=tokens,
            )
            self.runner, self._rows = self._make(self.prompts), self._make([])
            self.runner.hold()
        self._branches: ModelRunner | None = None
        self.device = self.runner.device
        self.hook_seconds = 0.0

    @property
    def seconds(self) -> float:
        runners = self.runner, self._rows, self._branches
        return sum(one.seconds for one in runners if one is not None) - self.hook_seconds

    def rows(self, prompt: Sequence[int], room: int) -> ModelRunner:
        """Rows that continue these prompts (numbers, repeated as needed), their caches filled.

        There is one set of rows: those handed out before become invalid.
        """
        self._rows.adopt(self.runner, prompt, room)
        return self._rows

    @torch.inference_mode()
    def ahead(self, source: ModelRunner, row: Sequence[int], token: Sequence[int]) -> Tensor:
        """Pre-logits ``[rows, d]`` after another token of some rows, which stay as they are.

        Args:
            source: a runner of these prompts or their rollouts, of which all is fed.
            row: numbers of its rows, repeated as needed.
            token: the token that follows each.
        """
        if self._branches is None:
            self._branches = self._make([])
        self._branches.adopt(source, row, 1)
        self._branches.append(token)
        found: list[Tensor] = []
        thread = get_ident()

        def note(_: Any, arguments: tuple[Any, ...]) -> None:
            if get_ident() == thread:
                found.append(arguments[0][:, -1])

        handle = self.head.register_forward_pre_hook(note)
        try:
            self._branches.step()
        finally:
            handle.remove()
        return found[-1]


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
            each prompt, at the price of twice as many more rows in the head.
        fisher: measure F u on those rollouts too; the head's weights must be plain.

    Attributes:
        rows: the cells' answers, by number.
        dot: float32 ``[cells]``, sum over the steps of u . eps; complete when all have finished.
        common_dot: the same of the noise's common part, which counts once.
        kl: for each metered cell, the divergence of its next-token laws from the base model's, both
            at the sampling temperature and before top-k and top-p, summed over its steps.
        kl_fisher: for each metered cell, what u alone does to those laws, to second order:
            ``sum_v p(v) (w(v) - p . w)^2 / 2`` summed over steps, p the base's law at temperature T
            and w = W u / T what u adds to its logits (to what the head gives: a model's scales and
            caps behind the head are not counted).
        fisher: of each metered cell, ``F u = W^T (p * w - p (p . w)) / T``, float32 like a prompt's
            part of the mean: the gradient of ``kl_fisher`` in u.
        bend: of each metered cell, float64 ``[3]``, how far one may go along it: with f a step's
            own F u, the sums of ``f . f`` and of ``f . F f``, and the number of steps.
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
        fisher: bool = False,
    ) -> None:
        self.prompts, self.cells = prompts, list(cells)
        self.sampling, self.seed, self.iteration = sampling, seed, iteration
        self.noise = noise
        count, device = len(self.cells), prompts.device
        lengths = [len(prompts.prompts[prompt]) for prompt, _ in self.cells]
        self.rows = Rows(lengths, sampling.limits, self._title)
        self.dot = torch.zeros(count, dtype=torch.float32, device=device)
        self.common_dot = torch.zeros(count, dtype=torch.float32, device=device)
        self.kl = {i: 0.0 for i, (_, rollout) in enumerate(self.cells) if rollout < metered}
        self.kl_fisher = dict.fromkeys(self.kl, 0.0)
        self.fisher: dict[int, Tensor] = {}
        if noise is not None and fisher:
            self.fisher = {i: torch.zeros_like(noise.mean[0]) for i in self.kl}
        self.bend = {i: torch.zeros(3, dtype=torch.float64) for i in self.fisher}
        # Where u is 0 it does nothing to any law.
        self._shifts = noise is not None and bool(self.kl) and bool(noise.mean.any())
        self._prompt = self._column(prompt for prompt, _ in self.cells)
        self._rollout = self._column(rollout for _, rollout in self.cells)
        self._sequence = self._column(prompts.sequence[prompt] for prompt, _ in self.cells)
        self._position = self._column(lengths)
        self._token = torch.empty(count, dtype=torch.int64, device=device)
        self._dot = torch.zeros(count, dtype=torch.float32, device=device)
        self._runner: ModelRunner | None = None
        self._step = 0
        self._fired, self._thread = False, 0
        self._arrange()

    def _title(self, cell: int) -> str:
        prompt, rollout = self.cells[cell]
        return f"prompt {self.prompts.first + prompt}, rollout {rollout}"

    def _column(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.prompts.device)

    def _arrange(self) -> None:
        """What depends on which cells are active."""
        self._meter = [row for row, cell in enumerate(self.rows.active) if cell in self.kl]
        self._meter_index = self._column(self._meter)

    @property
    def done(self) -> bool:
        """Whether every rollout has ended."""
        return not self.rows.active

    # ---- logits ------------------------------------------------------------------------------

    def _before_head(self, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the head: one row a rollout, changed, plus metered base rows."""
        if get_ident() != self._thread:  # another search runs the same model
            return arguments
        start = perf_counter()
        self._fired = True
        if arguments[0].dim() != 3:
            raise ValueError(
                f"{class_name(self.prompts.model)} hands its head {list(arguments[0].shape)}, "
                "expected [rows, columns, d]; it has no pre-logits to search over"
            )
        hidden = arguments[0][:, -1]
        self._dtype = hidden.dtype
        if self._runner is None:
            hidden = hidden.index_select(0, self._prompt)
        base = hidden.index_select(0, self._meter_index) if self._meter else None
        hidden = self.changed(hidden)
        if base is not None:
            hidden = torch.cat((hidden, base))
        self.prompts.hook_seconds += perf_counter() - start
        return (hidden.unsqueeze(1), *arguments[1:])

    def changed(self, hidden: Tensor) -> Tensor:
        """What goes into the head in place of the active rollouts' pre-logits ``[active, d]``."""
        if self.noise is None:
            return hidden
        with span("perturb"):
            return self._perturbed(hidden, self.noise)

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
        self._fired, self._thread = False, get_ident()
        handle = self.prompts.head.register_forward_pre_hook(self._before_head)
        try:
            logits = (self.prompts.runner if self._runner is None else self._runner).step()
        finally:
            handle.remove()
        if not self._fired:
            raise ValueError(
                f"{class_name(self.prompts.model)} does not call its output embeddings as a "
                "module, so its pre-logits cannot be changed"
            )
        if self._meter:
            rows = len(self.rows.active)
            self._measure(logits[:rows], logits[rows:])
            logits = logits[:rows]
        self._logits = logits
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
            self.kl[self.rows.active[row]] += value
        if self.noise is not None and self._shifts:
            self._measure_shift(self.noise, log_q.exp_())

    def _measure_shift(self, noise: Noise, p: Tensor) -> None:
        """Add what u does to the base's laws ``[metered, V]`` of this step, and F u."""
        row, head = self._step + (noise.common > 0.0), self.prompts.head
        if row >= noise.mean.shape[1]:
            return
        of = noise.mean.index_select(0, self._prompt.index_select(0, self._meter_index))
        u = of[:, row] + of[:, 0] if noise.common > 0.0 else of[:, row]
        with loaded(head):
            moved = head(torch.cat((u, u[:1] * 0.0)).to(self._dtype)).float()
            shift = (moved[:-1] - moved[-1:])[:, : p.shape[1]] / self.sampling.temperature
            centred = shift - (p * shift).sum(-1, keepdim=True)
            pull = p * centred
            values = 0.5 * (pull * centred).sum(-1)
            if self.fisher:
                weight = head.weight
                if not (weight.is_floating_point() and weight.dim() == 2):
                    raise ValueError(
                        f"guard='fisher' needs a head with plain weights, {class_name(head)} has "
                        f"{weight.dtype} {list(weight.shape)}"
                    )
                weight, scale = weight[: p.shape[1]], 1.0 / self.sampling.temperature
                pull = (scale * pull).to(weight.dtype) @ weight
                along = scale * (pull @ weight.T).float()
                along -= (p * along).sum(-1, keepdim=True)
                squares = pull.float().square().sum(-1), (p * along * along).sum(-1)
                bends = torch.stack((*squares, torch.ones_like(values)), -1).double().cpu()
        for place, value in enumerate(values.tolist()):
            cell = self.rows.active[self._meter[place]]
            self.kl_fisher[cell] += value
            if self.fisher:
                self.bend[cell] += bends[place]
                for part in {row, 0} if noise.common > 0.0 else {row}:
                    self.fisher[cell][part] += pull[place].float()

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
            return ops.categorical_sample(scores, do_sample=False, check=False, out=out)
        return ops.categorical_sample(
            scores,
            temperature=sampling.temperature,
            seed=self.seed,
            position=self._position,
            sequence=self._sequence,
            iteration=self.iteration,
            rollout=self._rollout,
            stream=stream,
            check=False,
            out=out,
        )

    @torch.inference_mode()
    def commit(self, token: Tensor) -> list[int]:
        """Append a token to every active rollout; the cells that ended with it.

        Raises:
            ValueError: a token is -1, as the logits held NaN or +inf, or nothing finite.
        """
        values = token.tolist()
        ended = self.rows.emit(
            range(len(values)), values, lambda row: {"the model": self._logits[row]}
        )
        cells = [self.rows.active[row] for row in ended]
        self._step += 1
        self._position += 1
        if len(ended) < len(values) and self._runner is None:
            self._runner = self.prompts.rows(
                [self.cells[cell][0] for cell in self.rows.active], self.sampling.max_new_tokens
            )
        if self._runner is not None:
            self._runner.append(values, token)
        if ended:
            self.dot[self._column(cells)] = self._dot[self._column(ended)]
            kept = self.rows.drop(ended)
            if self._runner is not None and kept:
                self._runner.keep(kept)
            self._select(kept)
        return cells

    def _select(self, rows: Sequence[int]) -> None:
        index = self._column(rows)
        for name in ("_prompt", "_rollout", "_sequence", "_position", "_dot"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        self._token = torch.empty(len(index), dtype=torch.int64, device=index.device)
        self._arrange()

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Draw a token for every active rollout; the cells that ended with it."""
        return self.commit(self.draw(self.logits()))

    @torch.inference_mode()
    def branch(self, cells: Sequence[tuple[int, int]], parents: Sequence[int]) -> None:
        """Replace all rollouts by continuations of some of those that are active.

        Args:
            cells: (prompt, rollout) of the new rollouts, no more than there were at the start.
            parents: for each, the number of the active cell that it continues.
        """
        place = {cell: row for row, cell in enumerate(self.rows.active)}
        rows = [place[parent] for parent in parents]
        if self._runner is not None:
            self._runner.keep(rows)
        self.cells = list(cells)
        self.rows.branch(parents)
        self.dot = torch.zeros(len(rows), dtype=torch.float32, device=self._dot.device)
        self._select(rows)
        self._rollout = self._column(rollout for _, rollout in cells)

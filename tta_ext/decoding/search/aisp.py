"""Adaptive importance sampling on pre-logits (AISP, arXiv:2510.26219).

Gaussian noise goes onto the pre-logits (the input of the language-model head) of n rollouts; the
reward scores whole answers; importance sampling moves the noise's mean u towards what was rewarded;
repeat. For iteration k, rollout i, step t::

    v_t = u_t + sigma eps_t,  eps ~ N(0, I);   logits = head(z_t + v_t)
    w = softmax(reward / lambda - cost of moving away);   u_t <- u_t + sigma sum_i w_i eps_t^i

eps is a function of seed and indices: it is added by one fused op, made anew by another, and never
stored (:mod:`tta_ext.ops.prelogit`). The answer is the best-rewarded one of all iterations.

Noise that is drawn anew at each step, as in the paper (``coherence=0``), mostly evens out over an
answer: rollouts have much the same reward, and what little differs has to be credited to tau d
numbers. So part of the noise's variance, by default a quarter, goes to a draw that all steps of a
rollout share, with a mean of its own::

    v_t = (u + sqrt(c) sigma eps) + (u_t + sqrt(1 - c) sigma eps_t),   c = coherence

which is importance sampling as before, over (tau + 1) d numbers. With all of it (``coherence=1``)
few answers are enough, but what is rewarded at one step is repeated at the next: one word over and
over. Planners that sample controls do the same with noise of low frequency: Pinneri et al.,
"Sample-efficient cross-entropy method for real-time planning", arXiv:2008.06389.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from tta_ext import ops, rng
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.runtime.prompts import normalise_prompts
from tta_ext.decoding.search import checkpoint
from tta_ext.decoding.search.aisp_settings import (
    ESS_SHARE,
    AISPOptions,
    AISPSettings,
)
from tta_ext.decoding.search.base import Search, SearchMethod
from tta_ext.decoding.search.engine import (
    EngineFactory,
    LocalEngine,
    RolloutJob,
    Scored,
)
from tta_ext.decoding.search.guards import bounded, pull_back
from tta_ext.decoding.search.outcome import Candidate, IterationRecord, SearchResult, Timing
from tta_ext.decoding.search.sampling import Noise
from tta_ext.decoding.search.scales import (
    LOGIT_NOISE,
    deviation,
    lam_for_ess,
    noise_gain,
    prelogit_scale,
)

__all__ = [
    "AISPSearch",
    "AISPSettings",
    "AdaptiveImportanceSampling",
]


# Settings that a run may go on with, whatever it began with.
_MAY_CHANGE = ("iterations", "max_seconds", "reward_target", "batch_size", "reward_batch_size")


class AISPSearch(Search[AISPSettings]):
    """The state of an AISP run; see :class:`Search`.

    Attributes:
        mean: u, float32 ``[P, tau, d]``, changed in place by :meth:`step`; with ``coherence``
            ``[P, 1 + tau, d]``, the common part's first.
    """

    def __init__(
        self,
        method: AdaptiveImportanceSampling,
        prompts: Any,
        settings: AISPSettings,
        seed: int,
        sequence: Sequence[int] | None = None,
        first: int = 0,
    ) -> None:
        super().__init__(method, prompts, settings, seed, sequence, first)
        self.mean = torch.zeros(
            len(self.prompts),
            settings.tau + (settings.coherence > 0),
            self.engine.dimensions,
            dtype=torch.float32,
            device=self.engine.device,
        )
        if settings.sigma is None:
            self._sigma = LOGIT_NOISE * method.sigma_factor("logit")
        else:
            self._sigma = settings.sigma * method.sigma_factor(settings.sigma_unit)

    @property
    def sigma(self) -> float:
        """Standard deviation of the coming iteration's noise, absolute."""
        return self._sigma * self.settings.sigma_decay**self.iteration

    def job(self, cells: Sequence[tuple[int, int]]) -> RolloutJob:
        # Without noise there is nothing to measure, and the batch has best-of-n's shape.
        metered = self.settings.metered if self.sigma > 0 else 0
        noise, guarded = Noise(self.mean, *self._parts()), self.settings.guard is not None
        return RolloutJob(cells, self.iteration, noise, metered, fisher=guarded)

    def _parts(self) -> tuple[float, float]:
        """Standard deviations of the steps' own noise and of the common one."""
        sigma, share = self.sigma, self.settings.coherence
        return sigma * math.sqrt(1.0 - share), sigma * math.sqrt(share)

    def update(self, active: list[int], scored: Scored) -> list[dict[str, Any]]:
        """Move u by the importance-weighted mean of the noise."""
        settings, sigma = self.settings, self.sigma
        found, batch, device = scored.candidates, scored.batch, self.mean.device
        index = torch.tensor(active, device=device)
        mean = self.mean.index_select(0, index)
        lengths = [[len(one.tokens) for one in row] for row in found]
        length = torch.tensor(lengths, device=device)
        before = mean.double().square().sum((1, 2)).tolist()
        dots = [
            part.to(device).view(-1, len(active)).T.contiguous()
            for part in (batch.dot, batch.common_dot)
        ]
        dot, norm2 = self._cost(mean, dots, length)
        # Finite rewards beyond float32 are its largest number.
        reward = torch.tensor([[one.reward for one in row] for row in found], dtype=torch.float64)
        limit = torch.finfo(torch.float32).max
        reward = torch.where(reward == -math.inf, reward, reward.clamp(-limit, limit)).float()
        weights, lams = self._weights(reward.to(device), dot, norm2, sigma)
        new = mean if sigma == 0.0 else self._moved(mean, weights.w, active, length)
        ess = weights.ess.tolist()
        bound = self._bound(mean).tolist()
        kl, kl_fisher = (batch.of_prompts(meter, len(active)) for meter in ("kl", "kl_fisher"))
        if settings.guard is not None and sigma > 0.0:
            fisher, bend = (batch.of_prompts(name, len(active)) for name in ("fisher", "bend"))
            if None in fisher or None in bend:
                raise ValueError("guard='fisher' needs F u, which this engine does not measure")
            step = torch.stack(fisher).to(device) * self._scale(device).square()[:, None]
            lam = 1.0 if settings.guard_lam is None else settings.guard_lam
            pull = pull_back(step, torch.stack(bend), sigma, settings.coherence, lam)
            new = new - settings.step_size * pull
        different = [len({tuple(one.tokens) for one in row}) for row in found]
        measured = [row[: settings.metered] for row in lengths]
        self.mean[index] = bounded(new, kl, measured, different, settings)
        records: list[dict[str, Any]] = []
        for place, prompt in enumerate(active):
            low, high = settings.ess_low, settings.ess_high
            if (low is not None and ess[place] < low) or (high is not None and ess[place] > high):
                self.stopped[prompt] = "ess"
            records.append(
                {
                    "ess": ess[place],
                    "norm": math.sqrt(before[place]),
                    "kl": kl[place] if sigma > 0 else 0.0,
                    "kl_fisher": kl_fisher[place] if sigma > 0 else 0.0,
                    "kl_bound": bound[place],
                    "sigma": sigma,
                    "lam": lams[place],
                }
            )
        return records

    def _scale(self, device: torch.device) -> Tensor:
        """Standard deviation of the noise of each row of u, float32 ``[rows]``."""
        own, common = self._parts()
        rows = [common] if self.settings.coherence > 0 else []
        return torch.tensor(rows + [own] * self.settings.tau, dtype=torch.float32, device=device)

    def _bound(self, mean: Tensor) -> Tensor:
        """``|u|^2 / (2 sigma^2)`` of each prompt; rows without noise have no u."""
        scale = self._scale(mean.device).double()
        squares = mean.double().square().sum(-1) / (2.0 * scale.square())
        return torch.where(scale > 0, squares, 0.0).sum(-1)

    def _cost(self, mean: Tensor, dots: Sequence[Tensor], length: Tensor) -> tuple[Tensor, Tensor]:
        """u . eps and ``|u|^2`` of each rollout over its own steps, ``[active, n]``, as if all
        noise had the standard deviation sigma.
        """
        norm2 = mean.double().square().sum(-1)
        reached = length.clamp(max=self.settings.tau) - 1
        if not self.settings.coherence:
            return dots[0], norm2.cumsum(-1).gather(1, reached).float()
        sigma = self.sigma
        own, common = (sigma / part if part else 0.0 for part in self._parts())
        dot = own * dots[0] + common * dots[1]
        steps = own**2 * norm2[:, 1:].cumsum(-1).gather(1, reached)
        return dot, (steps + common**2 * norm2[:, :1]).float()

    def _moved(self, mean: Tensor, weights: Tensor, active: list[int], length: Tensor) -> Tensor:
        """u after the update, before the guards."""
        settings = self.settings
        if settings.baseline:
            weights = weights - 1.0 / settings.n
        given: dict[str, Any] = {
            "seed": self.seed,
            "iteration": self.iteration,
            "sequence": torch.tensor(
                [self.sequence[prompt] for prompt in active], device=mean.device
            ),
        }
        update = getattr(self.engine, "control_update", ops.control_update)
        if settings.coherence:
            # Row 0 counts for every rollout, row 1 + t for those that reached step t.
            noise = update(torch.zeros_like(mean), weights, sigma=1.0, length=length + 1, **given)
            new = noise.mul_(self._scale(mean.device)[:, None]).add_(mean)
        else:
            new = update(mean, weights, sigma=self.sigma, length=length, **given)
        return new if settings.step_size == 1.0 else mean + settings.step_size * (new - mean)

    def _weights(
        self, reward: Tensor, dot: Tensor, norm2: Tensor, sigma: float
    ) -> tuple[ops.Weights, list[float]]:
        """Importance weights, and the absolute lambda of each prompt."""
        settings = self.settings
        if settings.elites is not None and settings.elites < settings.n:
            order = reward.sort(dim=-1, descending=True, stable=True).indices
            reward = reward.scatter(1, order[:, settings.elites :], -math.inf)
        # Answers that are all ruled out tell nothing apart.
        ruled_out = torch.isinf(reward).all(-1, keepdim=True)
        reward = torch.where(ruled_out, 0.0, reward)
        lam, unit = settings.lam, settings.lam_unit
        if lam is None:
            lam, unit = max(1.0, ESS_SHARE * settings.n), "ess"
        alpha = settings.alpha
        if unit == "absolute" or lam == 0.0:
            weights = ops.importance_weights(reward, dot, norm2, lam=lam, alpha=alpha, sigma=sigma)
            return weights, [lam] * len(reward)
        rows = reward.tolist()
        if unit == "std":
            lams = [lam * deviation(row) for row in rows]
        else:
            lams = [lam_for_ess(row, lam) for row in rows]
        # One lambda a prompt: divide here and let the op work at 1. Where rewards are all equal any
        # will do.
        divisor = torch.tensor([[value or 1.0] for value in lams], dtype=torch.float32)
        scaled = (reward - reward.amax(-1, keepdim=True)) / divisor.to(reward.device)
        weights = ops.importance_weights(scaled, dot, norm2, lam=1.0, alpha=alpha, sigma=sigma)
        return weights, lams

    def result(self) -> SearchResult:
        result = super().result()
        shared = self.settings.coherence > 0
        result.mean = self.mean[:, 1:] + self.mean[:, :1] if shared else self.mean.clone()
        return result

    # ---- putting away ------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write u, seed, iteration, settings and all answers to a safetensors file, atomically."""
        state = {
            "settings": asdict(self.settings),
            "sigma": self._sigma,
            "seed": self.seed,
            "sequence": self.sequence,
            "iteration": self.iteration,
            "prompts": self.prompts,
            "encoded": self.encoded,
            "stopped": self.stopped,
            "candidates": [[asdict(one) for one in row] for row in self.candidates],
            "curves": [[one.as_dict() for one in curve] for curve in self.curves],
            "timing": {k: v for k, v in self.timing.as_dict().items() if k != "other"},
        }
        checkpoint.write(Path(path), self.mean, state, self.method.model)

    @classmethod
    def load(cls, method: AdaptiveImportanceSampling, path: Path, **changes: Any) -> AISPSearch:
        """A run from a file, with some of its settings changed; see
        :meth:`AdaptiveImportanceSampling.resume`.
        """
        mean, state = checkpoint.read(path, method.model)
        settings = replace(AISPSettings(**state["settings"]), **changes)
        if settings.iterations < state["iteration"]:
            raise ValueError(
                f"iterations is {settings.iterations}, but {state['iteration']} are done already"
            )
        # The ids as they were, whatever the tokenizer would make of the prompts now.
        search = cls(method, state["encoded"], settings, state["seed"], state["sequence"])
        if mean.shape != search.mean.shape:
            raise ValueError(
                f"{path} holds u of shape {list(mean.shape)}, this model's is "
                f"{list(search.mean.shape)}"
            )
        search.prompts[:] = state["prompts"]  # the list that the reward's prompts come from
        search.mean.copy_(mean)
        search._sigma = state["sigma"]
        search.iteration = state["iteration"]
        search.stopped = state["stopped"]
        if settings.iterations > search.iteration:
            search.stopped = ["" if why == "iterations" else why for why in search.stopped]
        search.candidates = [[Candidate(**one) for one in row] for row in state["candidates"]]
        search.curves = [[IterationRecord(**one) for one in row] for row in state["curves"]]
        search.tokens = [sum(len(one.tokens) for one in row) for row in search.candidates]
        search.asked = [len(row) for row in search.candidates]
        search._before = Timing(**state["timing"])
        return search


class AdaptiveImportanceSampling(SearchMethod[AISPSettings]):
    """Steer a model towards a reward by learning noise on its pre-logits, prompt by prompt.

    Args:
        model, reward, tokenizer, chat_template, probe: see
            :class:`SearchMethod`.
        settings: fields of :class:`AISPSettings` and
            :class:`SearchSettings`, such as ``n=32, iterations=8,
            sigma=0.5, lam=0.01, alpha=1.0, window=32, max_new_tokens=64``. The defaults are the one
            setting that benchmarks/aisp_rewards.py was tuned to; ``coherence=0`` is the paper's.

    Example:
        >>> aisp = AdaptiveImportanceSampling(model, reward, tokenizer, max_new_tokens=24)
        >>> result = aisp.generate("Tell me a story.", seed=0)
        >>> result.text, [record.mean for record in result.curves[0]]
    """

    name: ClassVar[str] = "aisp"
    settings_type = AISPSettings
    run_type = AISPSearch

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
            **settings: Unpack[AISPOptions],
        ) -> None: ...

        def start(  # type: ignore[override]
            self,
            prompts: Any,
            *,
            seed: int | torch.Generator | None = None,
            sequence: Sequence[int] | None = None,
            **settings: Unpack[AISPOptions],
        ) -> AISPSearch: ...

    def sigma_factor(self, unit: str) -> float:
        """What a sigma in this unit is multiplied with; measured once."""
        units = self.__dict__.setdefault("_units", {"absolute": 1.0})
        if unit not in units:
            if unit == "prelogit":
                units[unit] = prelogit_scale(self.model)
            else:
                units[unit] = 1.0 / noise_gain(self.model)
        return units[unit]

    def generate(  # type: ignore[override]
        self,
        prompts: Any,
        *,
        checkpoint: str | Path | None = None,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        **settings: Unpack[AISPOptions],
    ) -> SearchResult:
        """Answer prompts; arguments as :meth:`SearchMethod.generate`.

        Args:
            checkpoint: a file that the state is saved to after each iteration; if it exists the run
                goes on from it. All prompts then make one batch.

        Raises:
            ValueError: the checkpoint belongs to other prompts, or to a run with another seed,
                other ids or settings. Those may differ that say when a run ends and how
                large its batches are.
        """
        if checkpoint is None:
            return super().generate(
                prompts, seed=seed, sequence=sequence, progress=progress, **settings
            )
        path = Path(checkpoint)
        if path.exists():
            search = self._resumed(path, prompts, seed, sequence, settings)
        else:
            search = self.start(prompts, seed=seed, sequence=sequence, **settings)
            search.save(path)  # not after hours is it time to learn that it cannot be written
        search.run(lambda current: search.save(path))
        if progress is not None:
            progress(len(search.prompts))
        return search.result()

    def _resumed(
        self, path: Path, prompts: Any, seed: Any, sequence: Any, changes: Any
    ) -> AISPSearch:
        """The run in a file, which must be the one that is asked for."""

        def plain(value: Any) -> Any:
            return json.loads(json.dumps(value))

        wanted = self._merge(self.settings, changes)
        search = AISPSearch.load(
            self, path, **{name: getattr(wanted, name) for name in _MAY_CHANGE}
        )
        asked = {"prompts": normalise_prompts(prompts)}
        held: dict[str, Any] = {"prompts": search.prompts}
        if seed is not None:
            asked["seed"], held["seed"] = [rng.resolve_seed(seed)], [search.seed]
        if sequence is not None:
            asked["sequence"], held["sequence"] = [int(i) for i in sequence], search.sequence
        for one in fields(AISPSettings):
            if one.name not in _MAY_CHANGE:
                asked[one.name] = getattr(wanted, one.name)
                held[one.name] = getattr(search.settings, one.name)
        for name, value in asked.items():
            if plain(value) != plain(held[name]):
                what = "other prompts" if name == "prompts" else f"another {name}"
                raise ValueError(f"{path} holds a run over {what}; remove it or name another")
        return search

    def resume(self, path: str | Path, *, iterations: int | None = None) -> AISPSearch:
        """A run that :meth:`AISPSearch.save` has put away, to go on with the same bits.

        Args:
            path: the file.
            iterations: a new total, to make the run longer.

        Raises:
            ValueError: not such a file, or saved with a model of another size.
        """
        changes = {} if iterations is None else {"iterations": iterations}
        return AISPSearch.load(self, Path(path), **changes)

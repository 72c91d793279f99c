"""Adaptive importance sampling on pre-logits (AISP, arXiv:2510.26219).

Gaussian noise goes onto the pre-logits (the input of the language-model head) of n rollouts; the
reward scores whole answers; importance sampling moves the noise's mean u towards what was rewarded;
repeat. For iteration k, rollout i, step t::

    v_t = u_t + sigma eps_t,  eps ~ N(0, I);   logits = head(z_t + v_t)
    w = softmax(reward / lambda - cost of moving away);   u_t <- u_t + sigma sum_i w_i eps_t^i

eps is a function of seed and indices: it is added by one fused op, made anew by another, and never
stored (:mod:`tta_ext.ops.prelogit`). The answer is the best-rewarded one of all iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding import checkpoint
from tta_ext.decoding.kad import _seed
from tta_ext.decoding.outcome import Candidate, IterationRecord, SearchResult, Timing
from tta_ext.decoding.prompts import normalise_prompts
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.rollouts import Noise
from tta_ext.decoding.scales import deviation, head_row_norm, lam_for_ess, prelogit_scale
from tta_ext.decoding.search import (
    Scored,
    Search,
    SearchMethod,
    SearchSettings,
    check_counts,
    check_samples,
)

__all__ = [
    "AISPSearch",
    "AISPSettings",
    "AdaptiveImportanceSampling",
]

SIGMA_UNITS = ("absolute", "prelogit", "logit")
LAM_UNITS = ("absolute", "std", "ess")
# Where no sigma is given: noise that moves logits by this much, about what temperature 1 does.
LOGIT_NOISE = 1.5
# Where no lambda is given: this many standard deviations of an iteration's rewards.
RELATIVE_LAM = 0.3


@dataclass(frozen=True)
class AISPSettings(SearchSettings):
    """Settings of AISP.

    Attributes:
        n: rollouts an iteration.
        iterations: iterations (kappa).
        decoding: ``"greedy"`` (default): the most probable token under the noise, so that rollouts
            differ by their noise alone and the reward's credit goes to it; ``"sample"``: tokens are
            drawn on top of the noise.
        sigma: standard deviation of the noise, in units of ``sigma_unit``; 0 is best-of-n. None:
            the noise moves logits by about 1.5.
        sigma_unit: ``"absolute"``; ``"prelogit"``: times the measured root mean square of the
            pre-logits; ``"logit"``: divided by the mean norm of the head's rows.
        sigma_decay: factor on sigma from iteration to iteration.
        lam: temperature lambda of the reward in units of ``lam_unit``; 0 puts all weight on the
            best rollout. None: 0.3 standard deviations of the iteration's rewards.
        lam_unit: ``"absolute"``; ``"std"``: times the standard deviation of the iteration's
            rewards; ``"ess"``: lambda is chosen anew so that the reward alone gives this effective
            sample size.
        alpha: 0 to 1; below 1 moving away from the base model costs importance. Its standard
            deviation is about ``(1 - alpha) sqrt(tau d / ess)``, so at usual sizes even 0.9 drowns
            the reward.
        window: steps with noise (tau); None: ``max_new_tokens``. Memory is ``4 tau d`` bytes a
            prompt.
        step_size: share of the update that is applied.
        elites: only so many best rollouts get weight; None: all.
        baseline: subtract 1/n from the weights. The mean of the noise is zero, so this changes no
            expectation, and equal rewards then leave u where it is.
        norm_cap: u is scaled down to this Euclidean norm where it exceeds it.
        kl_budget: where an iteration's measured divergence from the base model (nats an answer)
            exceeds this, u is scaled down by the square root of the ratio.
        ess_low, ess_high: a prompt's search ends when the effective sample size leaves this range.
        kl_rollouts: rollouts an iteration on which the divergence is measured; 0 switches it off.
    """

    n: int = 32
    iterations: int = 8
    decoding: str = "greedy"
    sigma: float | None = None
    sigma_unit: str = "absolute"
    sigma_decay: float = 1.0
    lam: float | None = None
    lam_unit: str = "absolute"
    alpha: float = 1.0
    window: int | None = None
    step_size: float = 1.0
    elites: int | None = None
    baseline: bool = False
    norm_cap: float | None = None
    kl_budget: float | None = None
    ess_low: float | None = None
    ess_high: float | None = None
    kl_rollouts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.n, self.iterations)
        self._check_choice("sigma_unit", SIGMA_UNITS)
        self._check_choice("lam_unit", LAM_UNITS)
        for name in ("sigma", "lam"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}, expected a finite number >= 0")
        if self.lam_unit == "ess" and self.lam is not None and not 1.0 <= self.lam <= self.n:
            raise ValueError(f"lam is {self.lam!r} in units of ess, expected 1 to n = {self.n}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha!r}, expected 0 <= alpha <= 1")
        for name in ("sigma_decay", "step_size", "norm_cap", "kl_budget"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, expected a finite number > 0")
        for name in ("window", "elites"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not 0 <= self.kl_rollouts <= self.n:
            raise ValueError(f"kl_rollouts is {self.kl_rollouts}, expected 0 to n = {self.n}")
        if self.kl_budget is not None and not self.kl_rollouts:
            raise ValueError("kl_budget needs a measured divergence; set kl_rollouts to 1 or more")

    def _check_choice(self, name: str, known: Sequence[str]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(
                f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
            )

    def schedule(self) -> list[int]:
        return [self.n] * self.iterations

    def for_samples(self, samples: int) -> AISPSettings:
        return replace(self, iterations=check_samples(samples, self.n) // self.n)

    def for_seconds(self, seconds: float) -> AISPSettings:
        return replace(self, iterations=rng.ITERATIONS, max_seconds=seconds)

    @property
    def tau(self) -> int:
        """Steps with noise."""
        return self.max_new_tokens if self.window is None else min(self.window, self.max_new_tokens)


class AdaptiveImportanceSampling(SearchMethod[AISPSettings]):
    """Steer a model towards a reward by learning noise on its pre-logits, prompt by prompt.

    Args:
        model, reward, tokenizer, chat_template, probe: see
            :class:`~tta_ext.decoding.search.SearchMethod`.
        settings: fields of :class:`AISPSettings` and
            :class:`~tta_ext.decoding.search.SearchSettings`, such as ``n=32, iterations=8,
            sigma=0.5, lam=0.01, alpha=1.0, window=32, max_new_tokens=64``.

    Example:
        >>> aisp = AdaptiveImportanceSampling(model, reward, tokenizer, n=16, iterations=16)
        >>> result = aisp.generate("Tell me a story.", seed=0)
        >>> result.text, [record.mean for record in result.curves[0]]
    """

    name: ClassVar[str] = "aisp"
    settings_type = AISPSettings

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
        super().__init__(
            model, reward, tokenizer, chat_template=chat_template, probe=probe, **settings
        )
        self._units: dict[str, float] = {"absolute": 1.0}

    def sigma_factor(self, unit: str) -> float:
        """What a sigma in this unit is multiplied with; measured once."""
        if unit not in self._units:
            if unit == "prelogit":
                self._units[unit] = prelogit_scale(self.model)
            else:
                self._units[unit] = 1.0 / head_row_norm(self.model)
        return self._units[unit]

    def start(
        self,
        prompts: Any,
        *,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | None = None,
        **settings: Any,
    ) -> AISPSearch:
        return AISPSearch(
            self, prompts, self._merge(self.settings, settings), _seed(seed), sequence
        )

    def generate(
        self,
        prompts: Any,
        *,
        checkpoint: str | Path | None = None,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> SearchResult:
        """Answer prompts; arguments as :meth:`SearchMethod.generate`.

        Args:
            checkpoint: a file that the state is saved to after each iteration; if it exists the run
                goes on from it. All prompts then make one batch.

        Raises:
            ValueError: the checkpoint belongs to other prompts.
        """
        if checkpoint is None:
            return super().generate(
                prompts, seed=seed, sequence=sequence, progress=progress, **settings
            )
        path = Path(checkpoint)
        if path.exists():
            search = self.resume(path)
            if search.prompts != normalise_prompts(prompts):
                raise ValueError(
                    f"{path} holds a run over other prompts; remove it or name another"
                )
        else:
            search = self.start(prompts, seed=seed, sequence=sequence, **settings)
        search.run(lambda current: search.save(path))
        if progress is not None:
            progress(len(search.prompts))
        return search.result()

    def resume(self, path: str | Path, *, iterations: int | None = None) -> AISPSearch:
        """A run that :meth:`AISPSearch.save` has put away, to go on with the same bits.

        Args:
            path: the file.
            iterations: a new total, to make the run longer.

        Raises:
            ValueError: not such a file, or saved with a model of another size.
        """
        return AISPSearch.load(self, Path(path), iterations)


class AISPSearch(Search[AISPSettings]):
    """The state of an AISP run; see :class:`~tta_ext.decoding.search.Search`.

    Attributes:
        mean: u, float32 ``[P, tau, d]``, changed in place by :meth:`step`.
    """

    def __init__(
        self,
        method: AdaptiveImportanceSampling,
        prompts: Any,
        settings: AISPSettings,
        seed: int,
        sequence: Sequence[int] | None = None,
        encoded: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(method, prompts, settings, seed, sequence, encoded)
        self.mean = torch.zeros(
            len(self.prompts),
            settings.tau,
            self.cache.dimensions,
            dtype=torch.float32,
            device=self.cache.device,
        )
        if settings.sigma is None:
            self._sigma = LOGIT_NOISE * method.sigma_factor("logit")
        else:
            self._sigma = settings.sigma * method.sigma_factor(settings.sigma_unit)

    @property
    def sigma(self) -> float:
        """Standard deviation of the coming iteration's noise, absolute."""
        return self._sigma * self.settings.sigma_decay**self.iteration

    def noise(self) -> Noise:
        return Noise(self.mean, self.sigma)

    @property
    def metered(self) -> int:
        # Without noise there is nothing to measure, and the batch has best-of-n's shape.
        return self.settings.kl_rollouts if self.sigma > 0 else 0

    def update(self, active: list[int], batch: Scored) -> list[dict[str, Any]]:
        """Move u by the importance-weighted mean of the noise."""
        settings, sigma = self.settings, self.sigma
        index = torch.tensor(active, device=self.mean.device)
        mean = self.mean.index_select(0, index)
        length = batch.lengths()
        norm2 = mean.double().square().sum(-1)
        before = norm2.sum(-1).tolist()
        reached = length.clamp(max=settings.tau) - 1
        penalty = norm2.cumsum(-1).gather(1, reached).float()
        weights, lams = self._weights(batch.rewards(), batch.dot, penalty, sigma)
        new = mean
        if sigma > 0:
            new = ops.control_update(
                mean,
                weights.w - 1.0 / settings.n if settings.baseline else weights.w,
                sigma=sigma,
                seed=self.seed_tensor,
                iteration=self.iteration,
                sequence=torch.tensor(
                    [self.sequence[prompt] for prompt in active], device=mean.device
                ),
                length=length,
            )
            if settings.step_size != 1.0:
                new = mean + settings.step_size * (new - mean)
        ess = weights.ess.tolist()
        kl = [sum(values) / len(values) if values else None for values in batch.kl]
        self.mean[index] = self._guarded(new, kl)
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
                    "kl_bound": before[place] / (2 * sigma * sigma) if sigma > 0 else 0.0,
                    "sigma": sigma,
                    "lam": lams[place],
                }
            )
        return records

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
            lam, unit = RELATIVE_LAM, "std"
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

    def _guarded(self, mean: Tensor, kl: list[float | None]) -> Tensor:
        """u after the norm cap and the divergence budget."""
        settings = self.settings
        factor = torch.ones(len(kl), dtype=torch.float32, device=mean.device)
        if settings.kl_budget is not None:
            for place, value in enumerate(kl):
                if value is not None and value > settings.kl_budget:
                    factor[place] = math.sqrt(settings.kl_budget / value)
        if settings.norm_cap is not None:
            norm = mean.double().square().sum((1, 2)).sqrt().float() * factor
            factor = torch.where(
                norm > settings.norm_cap, factor * settings.norm_cap / norm, factor
            )
        return mean * factor[:, None, None] if bool((factor != 1.0).any()) else mean

    def result(self) -> SearchResult:
        result = super().result()
        result.mean = self.mean.clone()
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
        checkpoint.write(Path(path), self.mean, state)

    @classmethod
    def load(
        cls, method: AdaptiveImportanceSampling, path: Path, iterations: int | None = None
    ) -> AISPSearch:
        """A run from a file; see :meth:`AdaptiveImportanceSampling.resume`."""
        mean, state = checkpoint.read(path)
        settings = AISPSettings(**state["settings"])
        if iterations is not None:
            if iterations < state["iteration"]:
                raise ValueError(
                    f"iterations is {iterations}, but {state['iteration']} are done already"
                )
            settings = replace(settings, iterations=iterations)
        search = cls(
            method, state["prompts"], settings, state["seed"], state["sequence"], state["encoded"]
        )
        if mean.shape != search.mean.shape:
            raise ValueError(
                f"{path} holds u of shape {list(mean.shape)}, this model's is "
                f"{list(search.mean.shape)}"
            )
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

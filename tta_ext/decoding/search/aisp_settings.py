"""Settings of adaptive importance sampling (:mod:`tta_ext.decoding.search.aisp`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tta_ext import rng
from tta_ext.decoding.runtime.prompts import whole_number
from tta_ext.decoding.search.ranges import check_choice, check_range
from tta_ext.decoding.search.settings import (
    SearchOptions,
    SearchSettings,
    check_counts,
    check_samples,
)

__all__ = ["ESS_SHARE", "KL_A_TOKEN", "AISPOptions", "AISPSettings"]

SIGMA_UNITS = ("absolute", "prelogit", "logit")
LAM_UNITS = ("absolute", "std", "ess")
GUARDS = ("fisher",)
# The defaults were chosen on the tuning prompts of benchmarks/aisp_rewards.py.
# Where no lambda is given: the effective sample size is this share of the rollouts.
ESS_SHARE = 0.25
# Where no kl_budget is given: nats a token.
KL_A_TOKEN = 2.0
# Where no kl_rollouts are given: so many, if there are.
KL_ROLLOUTS = 4


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
            the noise moves logits by about 2.
        sigma_unit: ``"absolute"``; ``"prelogit"``: times the measured root mean square of the
            pre-logits; ``"logit"``: divided by what noise on the pre-logits does to logits, the
            mean norm of the head's rows times what the model does to its outputs.
        sigma_decay: factor on sigma from iteration to iteration.
        coherence: share of the noise's variance that is the same at all steps of a rollout, 0 (the
            paper's noise) to 1.
        lam: temperature lambda of the reward in units of ``lam_unit``; 0 puts all weight on the
            best rollout. None: an effective sample size of a quarter of the rollouts.
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
            exceeds this, u is scaled down by the square root of the ratio. None: 2 nats a token of
            the answers on which it is measured; ``inf``: no bound.
        guard: ``"fisher"``: u also moves against the divergence that it causes, by
            ``guard_lam`` times the gradient of ``kl_fisher``, as measured on ``kl_rollouts``
            rollouts (MISVO's ``u += eta (g - lambda F u)``); see
            :mod:`tta_ext.decoding.search.guards`. None: nothing.
        guard_lam: weight of a nat of divergence, 0 or more; 0 is no guard. None: 1 with a guard.
        distinct_low: where a smaller share of an iteration's answers are different from each other,
            u is halved: the search has collapsed onto one answer and should look about again.
        ess_low, ess_high: a prompt's search ends when the effective sample size leaves this range.
        kl_rollouts: rollouts an iteration on which the divergence is measured; 0 switches it off,
            and with it the bound. None: 4, or n where that is less.
    """

    n: int = 16
    iterations: int = 16
    decoding: str = "greedy"
    sigma: float | None = None
    sigma_unit: str = "absolute"
    sigma_decay: float = 1.0
    coherence: float = 0.25
    lam: float | None = None
    lam_unit: str = "absolute"
    alpha: float = 1.0
    window: int | None = None
    step_size: float = 1.0
    elites: int | None = None
    baseline: bool = False
    norm_cap: float | None = None
    kl_budget: float | None = None
    guard: str | None = None
    guard_lam: float | None = None
    distinct_low: float | None = None
    ess_low: float | None = None
    ess_high: float | None = None
    kl_rollouts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.n, self.iterations)
        check_choice(self, "sigma_unit", SIGMA_UNITS)
        check_choice(self, "lam_unit", LAM_UNITS)
        check_range(self, "a finite number >= 0", "sigma", "lam", "guard_lam")
        if self.guard is not None:
            check_choice(self, "guard", GUARDS)
        elif self.guard_lam is not None:
            raise ValueError(f"guard_lam is {self.guard_lam!r} without a guard; set guard='fisher'")
        check_range(self, "a finite number > 0", "sigma_decay", "step_size")
        check_range(self, "a finite number > 0", "norm_cap")
        check_range(self, "more than 0", "kl_budget")
        check_range(self, "0 <= {} <= 1", "alpha", "coherence")
        check_range(self, "0 to 1", "distinct_low")
        check_range(self, "at least 1", "window", "elites")
        if self.lam_unit == "ess" and self.lam is not None and not 1.0 <= self.lam <= self.n:
            raise ValueError(f"lam is {self.lam!r} in units of ess, expected 1 to n = {self.n}")
        if self.kl_rollouts is not None:
            whole_number("kl_rollouts", self.kl_rollouts, None)
            if not 0 <= self.kl_rollouts <= self.n:
                raise ValueError(f"kl_rollouts is {self.kl_rollouts}, expected 0 to n = {self.n}")
        for name in ("kl_budget", "guard"):
            if getattr(self, name) is not None and self.kl_rollouts == 0:
                raise ValueError(
                    f"{name} needs a measured divergence; set kl_rollouts to 1 or more"
                )

    def schedule(self) -> list[int]:
        return [self.n] * self.iterations

    def for_samples(self, samples: int) -> AISPSettings:
        return replace(self, iterations=check_samples(samples, self.n) // self.n)

    def for_seconds(self, seconds: float) -> AISPSettings:
        return replace(self, iterations=rng.ITERATIONS, max_seconds=seconds)

    @property
    def metered(self) -> int:
        """Rollouts of an iteration on which the divergence is measured."""
        return min(KL_ROLLOUTS, self.n) if self.kl_rollouts is None else self.kl_rollouts

    @property
    def tau(self) -> int:
        """Steps with noise."""
        return self.max_new_tokens if self.window is None else min(self.window, self.max_new_tokens)


class AISPOptions(SearchOptions, total=False):
    """The fields of :class:`AISPSettings` as keywords."""

    n: int
    iterations: int
    sigma: float | None
    sigma_unit: str
    sigma_decay: float
    coherence: float
    lam: float | None
    lam_unit: str
    alpha: float
    window: int | None
    step_size: float
    elites: int | None
    baseline: bool
    norm_cap: float | None
    kl_budget: float | None
    guard: str | None
    guard_lam: float | None
    distinct_low: float | None
    ess_low: float | None
    ess_high: float | None
    kl_rollouts: int | None

"""Implicit reward (proxy tuning): a base tilted by what alignment has changed in small experts.

    log pi = log p + sum_e beta_e (log q_e - log q0_e) - log Z

Not a rejection rule, but decoded by the same loop: no token comes from one model alone. Without
anti-experts q0 it is an ensemble; with negative beta, contrastive decoding.

Sources: proxy tuning, arXiv:2401.08565; emulated fine-tuning, arXiv:2310.12962; contrastive
decoding, arXiv:2210.15097.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.decoding.deferral.loop import Loop, Seen
from tta_ext.decoding.deferral.step import AskProxy, Drawn
from tta_ext.decoding.runtime.profiling import span
from tta_ext.rules import IMPLICIT_REWARD

__all__ = ["ImplicitReward", "ImplicitRewardLoop"]


@dataclass(frozen=True, eq=False)
class ImplicitReward:
    """What stands in a :class:`~tta_ext.rules.Rule`'s place when models are mixed.

    Attributes:
        param: beta, float32 ``[E]`` on the base's device, a weight for each expert.
        temperature: of all models and of the mixture.
    """

    param: Tensor
    temperature: float = 1.0
    name: str = IMPLICIT_REWARD
    needs_proxy: bool = True

    @classmethod
    def of(
        cls, beta: float | Sequence[float] | Tensor | None, experts: int, temperature: float
    ) -> ImplicitReward:
        """The mixture with one weight for all experts, or one for each.

        Raises:
            ValueError: none, another number of weights, or one that is not finite.
        """
        if beta is None:
            raise ValueError("param is None, expected beta: a number, or one for each expert")
        weights = torch.as_tensor(beta, dtype=torch.float32).flatten()
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(f"param is {beta!r}, expected finite betas")
        if weights.numel() not in (1, experts):
            raise ValueError(
                f"param has {weights.numel()} betas, expected {experts}, one for each expert"
            )
        return cls(weights.expand(experts).clone(), temperature)

    def select(self, index: Tensor) -> ImplicitReward:
        """Itself: no weight belongs to a row."""
        return self


class ImplicitRewardLoop(Loop):
    """Steps of the mixture.

    The first followers are the experts, then come as many anti-experts, or none. Logits processors
    change the base alone: in a ratio of experts they would cancel, or divide zero by zero.
    """

    rule: ImplicitReward
    processed = False

    def draw(self) -> tuple[Drawn, Seen]:
        logits, *others = [self.logits(runner) for runner in self.runners]
        named = zip(self.followers, others, strict=True)
        return self.drawn(logits, others), Seen(
            logits, [(runner.name, row, None) for runner, row in named]
        )

    def drawn(
        self,
        logits: Tensor,
        others: Sequence[Tensor | AskProxy],
        index: Tensor | None = None,
        position: Tensor | None = None,
        allowed: Sequence[bool] | None = None,
    ) -> Drawn:
        models = [other for other in others if isinstance(other, Tensor)]
        experts, anti = models[: len(self.rule.param)], models[len(self.rule.param) :]
        with span("sample"):
            token = ops.implicit_reward_sample(
                logits,
                torch.stack(experts),
                torch.stack(anti) if anti else None,
                self.rule.param,
                temperature=self.rule.temperature,
                seed=self.options.seed,
                position=self.base.total if position is None else position,
                sequence=self.sequence if index is None else self.sequence[index],
                do_sample=self.options.do_sample,
                check=False,
                out=self._token if position is None else None,
            )
        return Drawn(token, token.tolist(), [False] * len(token))

"""Implicit rewards: weighted sums of log-probabilities of several models.

log pi(v) = log p(v) + sum_e beta_e (log q_e(v) - log q0_e(v)) - log Z: a proxy after (expert) and
before (anti) alignment is a reward for the base model. The normalisers of the models cancel, so
logits serve as log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.reference import _common as common


def _term(expert: Tensor, anti: Tensor | None, beta: Tensor) -> Tensor:
    """beta (expert - anti), with a meaning where either of them rules a token out.

    Both -inf: the models agree, no contribution. One -inf: beta decides between -inf, which rules
    the token out, and +inf, which makes the row invalid. beta = 0 switches the expert off.
    """
    if anti is None:
        difference = expert
    else:
        both = torch.isneginf(expert) & torch.isneginf(anti)
        difference = torch.where(both, 0.0, expert - anti)
    return torch.where(beta == 0, 0.0, beta * difference)


def _scores(
    base_logits: Tensor,
    expert_logits: Tensor,
    anti_logits: Tensor | None,
    beta: Tensor,
    check: bool,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Combined scores ``[B, V]``, zero in the invalid rows, and which rows are invalid."""
    weights = beta.to(device=base_logits.device, dtype=compute_dtype)
    common.checked(
        ~torch.isfinite(weights),
        check,
        lambda e: f"beta[{e}] is {float(weights[e])}, expected a finite number",
    )
    invalid = common.check_logits("base_logits", base_logits, check)
    base = base_logits.to(compute_dtype)
    total = base
    for e in range(expert_logits.shape[0]):
        expert, read = expert_logits[e], (weights[e] != 0).expand(invalid.shape)
        invalid = invalid | common.check_logits(f"expert_logits[{e}]", expert, check, read)
        anti = None
        if anti_logits is not None:
            bad = common.check_logits(f"anti_logits[{e}]", anti_logits[e], check, read)
            invalid = invalid | bad
            anti = anti_logits[e].to(compute_dtype)
        total = total + _term(expert.to(compute_dtype), anti, weights[e])
    total = torch.where(torch.isneginf(base), -torch.inf, total)
    undefined = common.invalid_rows(total)
    common.checked(
        undefined & ~invalid,
        check,
        lambda row: f"row {row} of the combined scores is undefined or has no finite value",
    )
    invalid = invalid | undefined
    return common.usable(total, invalid), invalid


def implicit_reward_probs(
    base_logits: Tensor,
    expert_logits: Tensor,
    anti_logits: Tensor | None,
    beta: Tensor,
    temperature: float,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The combined law ``[B, V]`` in the compute dtype."""
    scores, invalid = _scores(base_logits, expert_logits, anti_logits, beta, check, compute_dtype)
    prob = common.softmax(scores, temperature, compute_dtype).prob
    return torch.where(invalid.unsqueeze(-1), torch.nan, prob).to(compute_dtype)


@common.flat
def implicit_reward_sample(
    base_logits: Tensor,
    expert_logits: Tensor,
    anti_logits: Tensor | None,
    beta: Tensor,
    temperature: float,
    key: common.KeyArguments,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A token of the combined law ``[B]``; its argmax without ``do_sample``."""
    key.check(check)
    scores, invalid = _scores(base_logits, expert_logits, anti_logits, beta, check, compute_dtype)
    if key.do_sample:
        weight = common.softmax(scores, temperature, compute_dtype).weight
        token = common.draw(weight, key.uniform(scores, rng.BASE))
    else:
        token = common.argmax(scores)
    return torch.where(invalid, -1, token)

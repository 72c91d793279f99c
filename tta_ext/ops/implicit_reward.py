"""Implicit rewards: decoding from a weighted sum of several models' log-probabilities.

    log pi(v) = log p(v) + sum_e beta_e (log q_e(v) - log q0_e(v)) - log Z

q_e is a small model after alignment (the expert), q0_e before (the anti-expert): their quotient is
an implicit reward, beta_e its strength (proxy tuning, arXiv:2401.08565). Without anti-experts the
sum is a product of experts: beta_e > 0 is an *ensemble*, beta_e < 0 *contrastive* decoding. The
models' normalisers cancel, so logits serve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tta_ext import rules
from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.ops._documentation import documented
from tta_ext.schemas import OPS

__all__ = ["implicit_reward_probs", "implicit_reward_sample"]

_PROBS = OPS["implicit_reward_probs"]
_SAMPLE = OPS["implicit_reward_sample"]

Models = tuple[Tensor, Tensor, Tensor | None, Tensor, float]


def _models(
    base_logits: Tensor,
    expert_logits: Tensor,
    anti_logits: Tensor | None,
    beta: float | Sequence[float] | Tensor,
    temperature: float,
) -> Models:
    args.check_logits("base_logits", base_logits, 2, "[B, V]")
    rows, vocabulary = base_logits.shape
    device = base_logits.device
    stacks = [("expert_logits", expert_logits)]
    if anti_logits is not None:
        stacks.append(("anti_logits", anti_logits))
    for name, stack in stacks:
        args.check_logits(name, stack, 3, "[E, B, V]")
        if stack.shape[1:] != base_logits.shape or stack.shape[0] != expert_logits.shape[0]:
            raise ValueError(
                f"{name} has shape {list(stack.shape)}, expected "
                f"[{expert_logits.shape[0]}, {rows}, {vocabulary}]"
            )
        if stack.device != device:
            raise ValueError(
                f"{name} is on {stack.device}, expected the device of base_logits, {device}"
            )
    experts = expert_logits.shape[0]
    if experts == 0:
        raise ValueError(f"expert_logits has shape {list(expert_logits.shape)}, expected E >= 1")
    if not isinstance(beta, Tensor):
        try:
            beta = torch.tensor(beta, dtype=torch.float32, device=device).reshape(-1)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            form = f"{experts} finite numbers or float32 [{experts}]"
            raise TypeError(f"beta is {beta!r}, expected {form}") from None
    args.check_tensor("beta", beta, torch.float32, (experts,), device)
    dtypes = {base_logits.dtype, *(stack.dtype for _, stack in stacks)}
    if len(dtypes) > 1:
        base_logits, expert_logits = base_logits.float(), expert_logits.float()
        anti_logits = None if anti_logits is None else anti_logits.float()
    temperature = rules.check_temperature("temperature", temperature)
    return base_logits, expert_logits, anti_logits, beta, temperature


def implicit_reward_probs(
    base_logits: Tensor,
    expert_logits: Tensor,
    anti_logits: Tensor | None,
    beta: float | Sequence[float] | Tensor,
    *,
    temperature: float = 1.0,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(c / T) of the scores ``c = base + sum_e beta_e (expert_e - anti_e)``.

    Args:
        base_logits: float32, float16 or bfloat16 ``[B, V]``, unit stride over V.
        expert_logits: ``[E, B, V]``.
        anti_logits: ``[E, B, V]``, or None to leave the terms out.
        beta: float32 ``[E]``, or numbers; any sign, finite.
        temperature: T > 0.
        check: raise ``ValueError`` for invalid rows (default on the CPU); otherwise they are NaN.
        out: contiguous float32 ``[B, V]`` to write.

    If the dtypes of the models differ, all are converted to float32 first.

    -inf: a token the base rules out stays out; where expert and anti-expert both rule it out, their
    term is 0; an expert alone rules it out if beta_e > 0, an anti-expert alone if beta_e < 0; the
    opposite signs would give +inf and make the row invalid; beta_e = 0 ignores model e.

    Bytes moved: ``B V ((1 + 2 E) s + 4)`` with s bytes a logit and anti-experts.

    Example:
        >>> base, expert = torch.zeros(1, 2), torch.tensor([[[0.0, 1.0]]])
        >>> implicit_reward_probs(base, expert, torch.zeros(1, 1, 2), 1.0)
        tensor([[0.2689, 0.7311]])
    """
    models = _models(base_logits, expert_logits, anti_logits, beta, temperature)
    base = models[0]
    outs = args.outputs(_PROBS, out, base)
    return invoke(_PROBS, (*models, args.check_flag(check, base)), outs)[0]


@documented
def implicit_reward_sample(
    base_logits: Tensor,
    expert_logits: Tensor,
    anti_logits: Tensor | None,
    beta: float | Sequence[float] | Tensor,
    *,
    temperature: float = 1.0,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    sequence: int | Tensor | None = None,
    iteration: int = 0,
    rollout: int | Tensor = 0,
    do_sample: bool = True,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A token of :func:`implicit_reward_probs`, int64 ``[B]``.

    Args:
        base_logits, expert_logits, anti_logits, beta, temperature: as there.
        {key} Stream: BASE.
        check: raise ``ValueError`` for invalid rows (default on the CPU); otherwise token -1.
        out: contiguous int64 ``[B]`` to write.

    Bytes moved: ``B V (1 + 2 E) s`` with s bytes a logit and anti-experts.

    Example:
        >>> base, expert = torch.zeros(1, 2), torch.tensor([[[0.0, 9.0]]])
        >>> implicit_reward_sample(base, expert, None, 1.0, seed=0, position=0)
        tensor([1])
    """
    models = _models(base_logits, expert_logits, anti_logits, beta, temperature)
    base = models[0]
    key = args.key_arguments(base, seed, position, sequence, iteration, rollout, do_sample)
    outs = args.outputs(_SAMPLE, out, base)
    return invoke(_SAMPLE, (*models, *key, args.check_flag(check, base)), outs)[0]

"""One step of deferral as a function: logits and row facts in, tokens and their sources out.

It knows no model, cache or loop, so an engine that owns those calls it as it is: with the proxy's
logits where it has them, or with a function that is asked for the rows whose draw was rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.runtime.profiling import span
from tta_ext.rules import Rule

__all__ = ["AskProxy", "Drawn", "deferral_step"]

# ``ask(rows, index)``: the proxy's logits ``[len(rows), V]`` of some rows, ascending, given as a
# list and as int64 on the device of the logits; both None for all rows.
AskProxy: TypeAlias = "Callable[[list[int] | None, Tensor | None], Tensor]"


class Drawn(NamedTuple):
    """What a step drew.

    Attributes:
        token: int64 ``[B]``; -1 where a model's logits have NaN or +inf, or no finite value.
        from_proxy: for each row, whether the proxy wrote its token.
    """

    token: Tensor
    from_proxy: list[bool]


def deferral_step(
    base_logits: Tensor,
    proxy: Tensor | AskProxy,
    rule: Rule,
    *,
    seed: int | Tensor,
    position: Tensor,
    sequence: Tensor,
    do_sample: bool = True,
    out: ops.Proposal | None = None,
) -> Drawn:
    """Draw a token a row from the rule's mixture of base and proxy.

    Args:
        base_logits: float32, float16 or bfloat16 ``[B, V]``, after processors and masks.
        proxy: the proxy's logits ``[B, V]``; or, for a rule that looks at the base alone, a
            function that is asked for the rejected rows only (:data:`AskProxy`), at most once.
            Both give the same tokens.
        rule: the rule; a ``param`` by row has ``B`` values.
        seed: int or int64 ``[1]``.
        position: int64 ``[B]``, tokens that stand before the one to draw, padding excluded.
        sequence: int64 ``[B]``, 32-bit ids of the rows' random streams.
        do_sample: draw; False takes the mixture's most probable token, ties to the lowest id.
        out: tensors to write to.

    Raises:
        ValueError: a function for a rule that compares both models.
    """
    given: dict[str, Any] = {
        "rule": rule, "seed": seed, "position": position, "sequence": sequence,
        "do_sample": do_sample, "check": False, "out": out,
    }  # fmt: skip
    if isinstance(proxy, Tensor):
        with span("sample"):
            drawn = ops.deferral_sample(base_logits, proxy, **given)
        return Drawn(drawn.token, drawn.deferred.tolist())
    with span("propose"):
        drawn = ops.deferral_propose(base_logits, **given)
    flags = drawn.deferred.tolist()
    rows = [row for row, flag in enumerate(flags) if flag]
    if not rows:
        return Drawn(drawn.token, flags)
    if len(rows) == len(flags):
        index, proxy_logits = None, proxy(None, None)
    else:
        index = torch.tensor(rows, device=base_logits.device)
        proxy_logits = proxy(rows, index)
        position, sequence = position.index_select(0, index), sequence.index_select(0, index)
    with span("replace"):
        if do_sample:
            token = ops.categorical_sample(
                proxy_logits,
                temperature=rule.temperature,
                stream=rng.PROXY,
                seed=seed,
                position=position,
                sequence=sequence,
                check=False,
                out=drawn.token if index is None else None,
            )
        else:
            # "Deferred" said that the base alone cannot tell.
            if index is not None:
                base_logits, rule = base_logits.index_select(0, index), rule.select(index)
            token, deferred = ops.deferral_sample(
                base_logits, proxy_logits, rule=rule, do_sample=False, check=False
            )
            for row, flag in zip(rows, deferred.tolist(), strict=True):
                flags[row] = flag
        if index is not None:
            drawn.token.index_copy_(0, index, token)
        elif token is not drawn.token:
            drawn.token.copy_(token)
    return Drawn(drawn.token, flags)

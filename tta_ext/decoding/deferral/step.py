"""One step of deferral as a function: logits and row facts in, tokens and their sources out.

It knows no model, cache or loop, so an engine that owns those calls it as it is: with the proxy's
logits where it has them, or with a function that is asked for the rows whose draw was rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        tokens: the same on the host.
        from_proxy: for each row, whether the proxy wrote its token.
    """

    token: Tensor
    tokens: list[int]
    from_proxy: list[bool]

    @classmethod
    def fetch(cls, token: Tensor, deferred: Tensor) -> Drawn:
        """Tokens and flags, brought to the host in one copy: it waits for the device once."""
        if token.is_cpu:
            return cls(token, token.tolist(), deferred.tolist())
        tokens, flags = torch.stack((token, deferred.to(token.dtype))).tolist()
        return cls(token, tokens, [flag == 1 for flag in flags])


def _index(rows: list[int], device: torch.device) -> Tensor:
    """Numbers of rows, int64 on a device; the host does not wait for the copy."""
    index = torch.tensor(rows)
    if device.type == "cuda":  # which copies from pageable memory while the host waits
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


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
    allowed: Sequence[bool] | None = None,
) -> Drawn:
    """Draw a token a row from the rule's mixture of base and proxy.

    What the device computed is waited for once; and once more if a function was asked for the
    proxy, whose tokens are known no sooner.

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
        allowed: for each row, whether the proxy may write; where not, the law is the base's. None:
            everywhere.

    Raises:
        ValueError: a function for a rule that compares both models.
    """

    def base_alone(drawn: ops.Proposal) -> None:
        """What becomes of the rows in which the proxy may not write; no wait for the device."""
        barred = [row for row, may in enumerate(allowed or ()) if not may]
        if not barred:
            return
        index = _index(barred, base_logits.device)
        token = ops.categorical_sample(
            base_logits.index_select(0, index),
            temperature=rule.temperature,
            stream=rng.BASE,
            seed=seed,
            position=position.index_select(0, index),
            sequence=sequence.index_select(0, index),
            do_sample=do_sample,
            check=False,
        )
        drawn.token.index_copy_(0, index, token)
        drawn.deferred.index_fill_(0, index, False)

    given: dict[str, Any] = {
        "rule": rule, "seed": seed, "position": position, "sequence": sequence,
        "do_sample": do_sample, "check": False, "out": out,
    }  # fmt: skip
    if isinstance(proxy, Tensor):
        with span("sample"):
            drawn = ops.deferral_sample(base_logits, proxy, **given)
        base_alone(drawn)
        return Drawn.fetch(*drawn)
    with span("propose"):
        drawn = ops.deferral_propose(base_logits, **given)
    base_alone(drawn)
    found = Drawn.fetch(*drawn)
    tokens, flags = found.tokens, found.from_proxy
    rows = [row for row, flag in enumerate(flags) if flag]
    if not rows:
        return found
    if len(rows) == len(flags):
        index, proxy_logits = None, proxy(None, None)
    else:
        index = _index(rows, base_logits.device)
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
            replaced = token.tolist()
        else:
            # "Deferred" said that the base alone cannot tell.
            if index is not None:
                base_logits, rule = base_logits.index_select(0, index), rule.select(index)
            token, replaced, decided = Drawn.fetch(
                *ops.deferral_sample(
                    base_logits, proxy_logits, rule=rule, do_sample=False, check=False
                )
            )
            for row, flag in zip(rows, decided, strict=True):
                flags[row] = flag
        for row, one in zip(rows, replaced, strict=True):
            tokens[row] = one
        if index is not None:
            drawn.token.index_copy_(0, index, token)
        elif token is not drawn.token:
            drawn.token.copy_(token)
    return found

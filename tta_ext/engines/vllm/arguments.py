"""A request's arguments as vLLM's ``SamplingParams`` bring them."""

from __future__ import annotations

from typing import Any

from tta_ext.engines.rows import Asked

__all__ = ["PROCESSED", "parse"]

# The logprobs mode in which drawn tokens bring their source along.
PROCESSED = "processed_logits"

# What comes after our draw, and the values at which it does nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
}
# What the second model runner applies after our draw, the first one before.
_LATE: dict[str, tuple[Any, ...]] = {
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "min_tokens": (0,),
}


def parse(params: Any, *, told: bool = False, late: bool = False) -> Asked | None:
    """What a request asked for; None where it asked for nothing.

    Args:
        params: vLLM's ``SamplingParams``.
        told: the server returns processed logits.
        late: it masks tokens after our draw.

    Raises:
        ValueError: an argument of ours that makes no sense, or one of vLLM's that is not used.
    """
    wants = told and params.logprobs is not None
    try:
        asked = Asked.parse(
            params.extra_args, temperature=params.temperature, seed=params.seed, told=wants
        )
    except TypeError as error:
        raise ValueError(str(error)) from None
    if asked is not None:
        for name, unused in (_UNUSED | (_LATE if late else {})).items():
            value = getattr(params, name, unused[0])
            if value not in unused:
                raise ValueError(
                    f"{name} is {value!r}, expected {unused[0]!r}: a request with tta_rule does "
                    f"not use it"
                )
    return asked

"""The names of transformers that are private or have moved since 5.0, all in one place.

Everything else that this package uses of transformers is public and has kept its name. The versions
in which these moved are in ``tests/test_compat.py``, which fails when one of them disappears.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, PrefixConstrainedLogitsProcessor
from transformers.cache_utils import CacheLayerMixin

__all__ = [
    "AttentionLayerCache",
    "accepts",
    "attention_implementation",
    "cache_argument",
    "is_recurrent",
    "kept_by_generate",
    "of_one_row",
    "passed_cache",
    "query_count",
]

# Of forwards and of ``generate``. The old name comes first: it never meant anything else, and a
# forward that lists both takes either.
CACHE_ARGUMENTS = ("past_key_values", "cache")


def accepts(model: Any, argument: str) -> bool:
    """Whether the signature of a model's forward, seen through decorators, has an argument."""
    return argument in inspect.signature(model.forward).parameters


def cache_argument(model: Any) -> str:
    """The name under which a model's forward takes its cache; the newest if it takes none."""
    return next((name for name in CACHE_ARGUMENTS if accepts(model, name)), CACHE_ARGUMENTS[-1])


def passed_cache(arguments: Mapping[str, Any]) -> tuple[str, Any, bool]:
    """The cache among what ``generate`` hands to a decoding method.

    Returns:
        The argument's name, the cache or None, and whether the caller of ``generate`` passed it:
        False for the cache that ``generate`` makes, and for any until 5.16, which do not tell.
    """
    for name in CACHE_ARGUMENTS:
        cache = arguments.get(name)
        if cache is not None:
            return name, cache, getattr(cache, "_is_user_defined", False)
    return CACHE_ARGUMENTS[0], None, False


def is_recurrent(model: Any) -> bool:
    """Whether a model keeps a state that cannot be cut to fewer tokens."""
    return getattr(model, "_is_stateful", False)


def attention_implementation(config: Any) -> str:
    """``"sdpa"``, ``"eager"`` or another name, from a text configuration."""
    return getattr(config, "_attn_implementation", None) or "eager"


def query_count(queries: int | Tensor) -> int:
    """How many queries a cache is asked about: until 5.3 it is given their positions."""
    return queries.shape[0] if isinstance(queries, Tensor) else queries


def of_one_row(constraint: PrefixConstrainedLogitsProcessor, row: int) -> LogitsProcessor:
    """A prefix constraint for one row of a call: its function is told that row's number."""
    allowed, beams = constraint._prefix_allowed_tokens_fn, constraint._num_beams
    return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row // beams, ids), 1)


KEPT_BY_GENERATE = (
    "streamer",
    "assistant_model",
    "synced_gpus",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


def kept_by_generate() -> dict[str, Any]:
    """What the caller of ``generate`` passed, and ``generate`` does not hand on to custom loops.

    Transformers keeps the streamer and the assistant model to itself, in silence; only its own
    frame knows of them. Empty outside of a call of ``generate``.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    found = frame.f_locals
    return {name: found[name] for name in KEPT_BY_GENERATE if found.get(name) is not None}


class AttentionLayerCache(CacheLayerMixin):
    """Base class of a layer's cache that grows without a limit."""

    is_sliding = False
    is_compileable = False

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

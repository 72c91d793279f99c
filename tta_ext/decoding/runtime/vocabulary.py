"""Do two models speak of the same tokens? The check that comes before mixing their probabilities.

Deferral mixes ``p`` and ``q`` token by token, so an id must mean the same token in both models.
Models pad their output layers to round sizes, and tokenizers may leave gaps: ids that are no token
in either vocabulary are cut off or masked. Any other difference is an error that names the first
differing token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Vocabulary", "align_vocabularies"]


@dataclass(frozen=True)
class Vocabulary:
    """The ids that may be drawn.

    Attributes:
        size: ids from here on are padding: only the first ``size`` logits are used.
        masked: ids below ``size`` that are no token either.
    """

    size: int
    masked: tuple[int, ...] = ()


def _by_id(tokenizer: Any) -> dict[int, str]:
    if not hasattr(tokenizer, "get_vocab"):
        kind = type(tokenizer).__name__
        raise TypeError(f"a tokenizer is a {kind}, expected a tokenizer of transformers")
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {index for index, token in added.items() if token.special}
    return special | set(getattr(tokenizer, "all_special_ids", ()))


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def align_vocabularies(
    base_size: int,
    proxy_size: int,
    base_tokenizer: Any = None,
    proxy_tokenizer: Any = None,
    *,
    proxy_name: str = "proxy",
) -> Vocabulary:
    """The common vocabulary of a base and a proxy model.

    Args:
        base_size, proxy_size: number of logits of each model.
        base_tokenizer, proxy_tokenizer: tokenizers; one alone counts for both models, and without
            any the sizes must be equal.
        proxy_name: what messages call the second model.

    Raises:
        ValueError: an id means different tokens, or a model has no logit for a token, or the sizes
            differ and there is no tokenizer to tell padding from tokens.

    Example:
        >>> align_vocabularies(512, 512)
        Vocabulary(size=512, masked=())
    """
    if base_tokenizer is None and proxy_tokenizer is None:
        if base_size != proxy_size:
            raise ValueError(
                f"base has {base_size} logits and {proxy_name} {proxy_size}, and without a "
                "tokenizer padding cannot be told from tokens; pass tokenizer="
            )
        return Vocabulary(base_size)
    base = _by_id(base_tokenizer if base_tokenizer is not None else proxy_tokenizer)
    proxy = base
    if base_tokenizer is not None and proxy_tokenizer not in (None, base_tokenizer):
        proxy = _by_id(proxy_tokenizer)
    if base != proxy:
        first = min(i for i in base.keys() | proxy.keys() if base.get(i) != proxy.get(i))
        raise ValueError(
            f"the vocabularies differ, first at id {first}: base has {_shown(base.get(first))}, "
            f"{proxy_name} has {_shown(proxy.get(first))}"
        )
    size = max(base, default=-1) + 1
    special = _special_ids(base_tokenizer) | _special_ids(proxy_tokenizer)
    for name, logits in (("base", base_size), (proxy_name, proxy_size)):
        beyond = [i for i in base if logits <= i < size]
        if beyond and special.issuperset(beyond):
            # Marks for images and the like, which are read but never drawn.
            size = logits
        elif beyond:
            first = min(beyond)
            raise ValueError(
                f"{name} has {logits} logits but the vocabulary has {size} ids, "
                f"first without a logit: {base[first]!r} at id {first}"
            )
    return Vocabulary(size, tuple(i for i in range(size) if i not in base))

"""From prompts to token ids, for two models that may want different templates.

A prompt is a string (taken as it is), a list of token ids, or a conversation: a list of
``{"role": ..., "content": ...}`` messages, rendered with each model's own chat template. Both
models continue the same answer, so only what stands before it may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tta_ext.decoding.runtime.models import embedding_count, position_limit

__all__ = [
    "Conversation",
    "Prompt",
    "check_prompts",
    "encode_prompts",
    "normalise_prompts",
    "sequence_ids",
    "unpad",
]

Conversation: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = "str | Conversation | Sequence[int]"


def normalise_prompts(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt or several.

    Raises:
        TypeError: neither a string, nor token ids, nor a conversation, nor a list of them.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}, expected a string, a conversation (list of "
            "messages), a list of token ids, or a list of these"
        )
    if len(prompts) and isinstance(prompts[0], (Mapping, int)):
        return [prompts]
    return list(prompts)


def chat_template(own: str | None, tokenizer: Any, fallback: Any) -> str:
    """The template to render conversations with: given, the tokenizer's, or the other model's.

    A base model usually has none; it then reads the aligned model's, whose text it can tokenize.

    Raises:
        ValueError: there is none.
    """
    for template in (
        own,
        getattr(tokenizer, "chat_template", None),
        getattr(fallback, "chat_template", None),
    ):
        if isinstance(template, Mapping):
            template = template.get("default")
        if template:
            return template
    raise ValueError(
        "neither tokenizer has a chat template; pass chat_template=, or prompts as plain strings"
    )


def encode_prompts(
    prompts: Sequence[Any],
    tokenizer: Any,
    *,
    template: str | None = None,
    fallback: Any = None,
) -> list[list[int]]:
    """Token ids of prompts for one model.

    Args:
        prompts: strings, token ids or conversations.
        tokenizer: the model's tokenizer; may be None if all prompts are token ids.
        template: chat template that overrides the tokenizer's.
        fallback: tokenizer whose chat template serves where this one has none.

    Raises:
        ValueError: text without a tokenizer, a conversation without a template, an empty prompt for
            a tokenizer without a beginning-of-sequence token.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            ids = [int(item) for item in prompt]
        elif tokenizer is None:
            raise ValueError(f"prompt {i} is text and there is no tokenizer; pass tokenizer=")
        elif isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif all(isinstance(item, Mapping) for item in prompt):
            ids = tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                chat_template=chat_template(template, tokenizer, fallback),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        else:
            raise TypeError(f"prompt {i} mixes messages with something else")
        if not ids:
            start = getattr(tokenizer, "bos_token_id", None)
            if start is None:
                raise ValueError(
                    f"prompt {i} is empty and the tokenizer has no bos token to start with"
                )
            ids = [start]
        encoded.append(list(ids))
    return encoded


def check_prompts(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, name: str = "the model"
) -> None:
    """Refuse ids without an embedding and contexts without positions.

    Args:
        model: the model that will read the prompts.
        prompts: token ids of each.
        max_new_tokens: tokens that follow each at most; the last of them needs no position.
        name: what messages call the model.

    Raises:
        ValueError: names the first such prompt.
    """
    size, limit = embedding_count(model), position_limit(model)
    for row, prompt in enumerate(prompts):
        if prompt and not 0 <= min(prompt) <= max(prompt) < size:
            wrong = next(i for i in prompt if not 0 <= i < size)
            raise ValueError(
                f"prompt {row} has the id {wrong}, expected ids from 0 to {size - 1} for {name}"
            )
        if limit and len(prompt) + max_new_tokens - 1 > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, "
                f"but {name} has only {limit} positions"
            )


def sequence_ids(given: Sequence[int] | Tensor | None, count: int) -> list[int]:
    """The ids of random streams, one for each prompt or answer: given, or 0, 1, ...

    Raises:
        ValueError: there are not ``count`` of them.
    """
    ids = list(range(count)) if given is None else [int(i) for i in given]
    if len(ids) != count:
        raise ValueError(f"sequence has {len(ids)} ids, expected {count}")
    return ids


def unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Rows of a padded batch without their padding (left or right).

    Args:
        input_ids: integer ``[rows, columns]``.
        attention_mask: same shape, 0 where a token is padding; None if there is none.

    Raises:
        TypeError: ``input_ids`` is not an integer tensor.
        ValueError: shapes do not match.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype.is_floating_point:
        raise TypeError(
            f"input_ids is a {_kind(input_ids)}, expected an integer tensor [rows, columns]"
        )
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, expected [rows, columns]")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, "
            f"expected that of input_ids, {list(input_ids.shape)}"
        )
    kept = attention_mask.to(torch.bool)
    return [row[keep].tolist() for row, keep in zip(input_ids, kept, strict=True)]


def _kind(value: Any) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__

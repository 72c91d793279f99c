"""From prompts to token ids, for two models that may want different templates.

A prompt is a string (taken as it is), a list of token ids, or a conversation: a list of
``{"role": ..., "content": ...}`` messages, rendered with each model's own chat template. Both
models continue the same answer, so only what stands before it may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tta_ext import rng
from tta_ext.decoding.runtime.models import embedding_count, position_limit

__all__ = [
    "Conversation",
    "Prompt",
    "PromptList",
    "check_prompts",
    "encode_prompts",
    "flag",
    "id_rows",
    "integers",
    "is_id",
    "normalise_prompts",
    "render",
    "sequence_ids",
    "text_of",
    "unpad",
    "whole_number",
]

Conversation: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = "str | Conversation | Sequence[int]"


_BYTES = (bytes, bytearray, memoryview)
_KINDS = "a string, a conversation (list of messages), a list of token ids, or several of these"


class PromptList(list[Any]):
    """Prompts, whatever they are: a number is no token id here, nor an object a message."""


def normalise_prompts(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt or several.

    Args:
        prompts: a string, a conversation or token ids; several of these in a list, a generator, a
            NumPy array, a column of pandas or datasets; ids as an integer tensor ``[columns]`` or
            ``[rows, columns]``; what a tokenizer returns. Of a :class:`PromptList` each is one.

    Returns:
        Strings, conversations as they are, and lists of ids.

    Raises:
        TypeError: something else, such as bytes; with the prompt's number.
        ValueError: a text has half a character (a lone surrogate).
    """
    if isinstance(prompts, str):
        return [_prompt(prompts, 0)]
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise TypeError(f"prompts is a {type(prompts).__name__}, expected {_KINDS}")
        return unpad(prompts["input_ids"], prompts.get("attention_mask"))
    if isinstance(prompts, _BYTES):
        raise TypeError("prompts is bytes, expected text; decode them first")
    if isinstance(prompts, (set, frozenset)):
        raise TypeError("prompts is a set, which has no order; expected a list")
    if isinstance(prompts, Tensor):
        return unpad(prompts, None)
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is a {type(prompts).__name__}, expected {_KINDS}")
    items = list(prompts)
    if isinstance(prompts, PromptList):
        return [_prompt(item, i) for i, item in enumerate(items)]
    if items and isinstance(items[0], Mapping):
        return [_prompt(items, 0)]
    if items and is_id(items[0]):
        return [integers(items, "prompts")]
    return [_prompt(item, i) for i, item in enumerate(items)]


def _prompt(item: Any, number: int) -> Any:
    """One of several prompts."""
    name = f"prompt {number}"
    if isinstance(item, str):
        return _text(item, name)
    if isinstance(item, (*_BYTES, Mapping)) or not isinstance(item, Iterable):
        raise TypeError(f"{name} is {_a(item)}, expected text, a list of token ids or of messages")
    if isinstance(item, Sequence) and item and any(isinstance(part, Mapping) for part in item):
        if not all(isinstance(part, Mapping) for part in item):
            raise TypeError(f"{name} mixes messages with something else")
        for message in item:
            _check_message(message, name)
        return item
    return integers(item, name)


def _text(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {text[error.start]!r}, which is no text"
        ) from None
    return str(text)


def _check_message(message: Mapping[str, Any], name: str) -> None:
    """Refuse a message that templates would print as None, or leave out without a word."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise TypeError(f"{name} has a message whose role is {role!r}, expected text")
    if isinstance(content, str):
        _text(content, name)
    elif content is None and message.keys() - {"role", "content"}:
        pass  # a call of a tool
    elif not (isinstance(content, list) and all(isinstance(one, Mapping) for one in content)):
        raise TypeError(f"{name} has a message whose content is {content!r:.60}, expected text")


def is_id(value: Any) -> bool:
    """Whether a value is an integer, whatever library's; True and 4.0 are none."""
    kind = getattr(value, "dtype", None)
    if isinstance(value, bool) or "bool" in str(kind) or getattr(value, "shape", ()) != ():
        return False
    return hasattr(value, "__index__") and "float" not in str(kind)


def integers(values: Any, name: str) -> list[int]:
    """Ids, of a prompt's tokens or of something else, of any library.

    Raises:
        TypeError: they are no integers; ``name`` says whose.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {_a(values)}, expected integers")
    found = list(values)
    for value in found:
        if not is_id(value):
            raise TypeError(f"{name} has {_a(value)} among its ids, expected integers")
    return [int(value) for value in found]


def _a(value: Any) -> str:
    kind = type(value).__name__
    return kind if kind in ("bytes", "NoneType") else f"a {kind}"


def whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """An argument that counts something, as an int.

    Args:
        name: what the message calls it.
        value: of any library.
        least: the smallest allowed; None leaves that to the caller.

    Raises:
        TypeError: no integer; 4.0 and True are none.
        ValueError: too small.
    """
    if not is_id(value):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """An argument that is true or false, of any library.

    Raises:
        TypeError: something else, such as the text "no", which would count as true.
    """
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


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


def render(
    tokenizer: Any,
    messages: Sequence[Any],
    template: str,
    *,
    add_generation_prompt: bool,
    named: tuple[str, str],
) -> dict[str, list[int]]:
    """A conversation's token ids, and what else the tokenizer makes of its text.

    Args:
        tokenizer: of the model that will read them.
        messages: the conversation.
        template: the chat template.
        add_generation_prompt: end where an answer begins.
        named: what errors call the conversation, and the model.

    Raises:
        ValueError: the template refuses the conversation, or is none.
    """
    try:
        found: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
        )
    except Exception as error:  # a template is a program, and fails as programs do
        line = " ".join(str(error).split())
        what, model = named
        raise ValueError(f"{what} is refused by the chat template for {model}: {line}") from error
    return {name: list(row) for name, row in found.items()}


def encode_prompts(
    prompts: Sequence[Any],
    tokenizer: Any,
    *,
    name: str = "the model",
    template: str | None = None,
    fallback: Any = None,
) -> list[list[int]]:
    """Token ids of prompts for one model.

    Args:
        prompts: strings, token ids or conversations.
        tokenizer: the model's tokenizer; may be None if all prompts are token ids.
        name: what messages call the model.
        template: chat template that overrides the tokenizer's.
        fallback: tokenizer whose chat template serves where this one has none.

    Raises:
        ValueError: text without a tokenizer, a conversation without a template, an empty prompt for
            a tokenizer without a beginning-of-sequence token.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not any(isinstance(item, Mapping) for item in prompt):
            ids = integers(prompt, f"prompt {i}")
        elif tokenizer is None:
            raise ValueError(f"prompt {i} is text and there is no tokenizer; pass tokenizer=")
        elif isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            chosen = chat_template(template, tokenizer, fallback)
            named = f"prompt {i}", name
            found = render(tokenizer, prompt, chosen, add_generation_prompt=True, named=named)
            ids = found["input_ids"]
        if not ids:
            start = getattr(tokenizer, "bos_token_id", None)
            if start is None:
                raise ValueError(
                    f"prompt {i} is empty and the tokenizer has no bos token to start with"
                )
            ids = [start]
        encoded.append(list(ids))
    return encoded


def text_of(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    """The text of token ids as it stands, whatever the tokenizer would clean up.

    Cleaning up takes spaces out of text that a stream has given away, and out of what stop strings
    are looked for in.

    Args:
        tokenizer: decodes ids.
        ids: of an answer, or a part of it.
        special: with the special tokens.
    """
    text: str = tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return text


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
        ValueError: there are not ``count`` of them, or one does not fit 32 bits.
    """
    ids = list(range(count)) if given is None else integers(given, "sequence")
    if len(ids) != count:
        raise ValueError(f"sequence has {len(ids)} ids, expected {count}")
    return [rng.check_word("sequence", one) for one in ids]


def unpad(input_ids: Any, attention_mask: Any) -> list[list[int]]:
    """Rows of a padded batch without their padding (left or right).

    Args:
        input_ids: integers ``[rows, columns]``, or ``[columns]`` for one row: a tensor, an array,
            or lists, which may have different lengths.
        attention_mask: same shape, 0 where a token is padding; None if there is none.

    Raises:
        TypeError: ``input_ids`` are no integers.
        ValueError: shapes do not match.
    """
    rows = id_rows(input_ids, "input_ids")
    if attention_mask is None:
        return rows
    if isinstance(attention_mask, Tensor):  # integers, booleans or floats
        attention_mask = attention_mask.bool().long()
    kept = id_rows(attention_mask, "attention_mask")
    if [len(row) for row in kept] != [len(row) for row in rows]:
        raise ValueError(
            f"attention_mask has shape {_shape(attention_mask, kept)}, "
            f"expected that of input_ids, {_shape(input_ids, rows)}"
        )
    return [
        [token for token, keep in zip(*pair, strict=True) if keep]
        for pair in zip(rows, kept, strict=True)
    ]


def id_rows(value: Any, name: str) -> list[list[int]]:
    """Rows of integers from a tensor, an array or lists; see :func:`unpad`."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        if "int" not in str(value.dtype):
            raise TypeError(
                f"{name} is a {value.dtype} {type(value).__name__}, "
                "expected integers [rows, columns]"
            )
        if len(shape) not in (1, 2):
            raise ValueError(f"{name} has shape {list(shape)}, expected [rows, columns]")
        if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided):
            raise TypeError(f"{name} is a sparse or meta tensor, expected one with its numbers")
        value = value.tolist()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {_a(value)}, expected integers [rows, columns]")
    rows = list(value)
    if rows and is_id(rows[0]):
        return [integers(rows, name)]
    return [integers(row, name) for row in rows]


def _shape(given: Any, rows: list[list[int]]) -> Any:
    shape = getattr(given, "shape", None)
    return list(shape) if shape is not None else f"of lengths {[len(row) for row in rows]}"

"""The names of transformers that are private or have moved since 5.0, all in one place.

Everything else that this package uses of transformers is public and has kept its name. The versions
in which these moved are in ``tests/test_compat.py``, which fails when one of them disappears.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, LogitsProcessor, PrefixConstrainedLogitsProcessor
from transformers.cache_utils import CacheLayerMixin

__all__ = [
    "AttentionLayerCache",
    "DecodingState",
    "accepts",
    "attention_implementation",
    "cache_argument",
    "has_rotary",
    "holds_tokens",
    "is_recurrent",
    "kept_by_generate",
    "logits_of",
    "masks_windows",
    "of_one_row",
    "passed_cache",
    "query_count",
    "reset_rotary",
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


def logits_of(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Logits ``[rows, columns, V]`` after ids ``[rows, columns]``, without any cache."""
    if accepts(model, "use_cache"):
        more["use_cache"] = False
    logits: Tensor = model(input_ids=ids, return_dict=True, **more).logits
    return logits


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


def holds_tokens(cache: Any) -> bool:
    """Whether a cache that was handed over has been used; None has not."""
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # recurrent states alone, which count no tokens
        return bool(cache.has_previous_state())


def is_recurrent(model: Any) -> bool:
    """Whether a model keeps a state that cannot be cut to fewer tokens."""
    return getattr(model, "_is_stateful", False)


def attention_implementation(config: Any) -> str:
    """``"sdpa"``, ``"eager"`` or another name, from a text configuration."""
    return getattr(config, "_attn_implementation", None) or "eager"


# What makes masks with windows, of which a model's own code imports some.
WINDOW_MASKS = (
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)


def masks_windows(model: Any) -> bool:
    """Whether a model's code makes attention masks with windows."""
    files = {sys.modules.get(type(module).__module__) for module in model.modules()}
    return any(hasattr(file, name) for file in files for name in WINDOW_MASKS)


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


class DecodingState:
    """What ``generate`` keeps of a batch between two forwards: cache, mask, positions.

    ``generate`` itself prepares it, with all that a model's class has to say about that, and hands
    it to a decoding method of ours, which takes nothing else.

    Args:
        model: a model that ``generate`` runs.
        ids, mask: int64 ``[rows, columns]``, padded on the left.
        room: tokens that will follow.
        pad: id of the padding.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, room: int, pad: int) -> None:
        self.model = model
        self.arguments: dict[str, Any] = {}
        self.first = True

        def method(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            synced_gpus: Any = None,
            assistant_model: Any = None,
            streamer: Any = None,
            tokenizer: Any = None,
            **arguments: Any,
        ) -> Tensor:
            self.arguments = arguments
            return input_ids

        model.generate(
            ids,
            attention_mask=mask,
            custom_generate=method,
            max_new_tokens=max(room, 1),
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            pad_token_id=pad,
        )
        if not _SLICES and hasattr(model, "_get_initial_cache_position"):
            width, given = ids.shape[1], self.arguments
            self.arguments = model._get_initial_cache_position(width, ids.device, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingState:
        state = copy.copy(self)
        state.arguments = copy.deepcopy(self.arguments, memo)
        return state

    def feed(self, ids: Tensor, columns: int = 1) -> Tensor:
        """Logits ``[rows, columns, V]`` of the last columns.

        Args:
            ids: all columns so far, of which all but the last have been fed, or none.
            columns: how many have not been fed; of the first forward the last one's are returned.
        """
        model = self.model
        if self.first:
            given = self.arguments
            inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
        else:
            if columns > 1:
                self.arguments = self._update({}, columns - 1)
            given = self.arguments.copy()
            if _SLICES:
                # A model without a cache is fed all columns again.
                given["next_sequence_length"] = columns if given.get("use_cache") else None
            if "logits_to_keep" in given:
                given["logits_to_keep"] = columns
            inputs = model.prepare_inputs_for_generation(ids, **given)
        self.first = False
        outputs = model(**inputs, return_dict=True)
        self.arguments = self._update(outputs)
        logits: Tensor = outputs.logits[:, -columns:]
        return logits

    def _update(self, outputs: Any, columns: int = 1) -> dict[str, Any]:
        """The arguments with so many columns more."""
        more = {"num_new_tokens": columns} if columns > 1 else {}
        updated: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            outputs, self.arguments.copy(), **more
        )
        return updated

    @property
    def croppable(self) -> bool:
        """Whether :meth:`crop` can take columns back."""
        caches = [value for value in self.arguments.values() if isinstance(value, Cache)]
        return bool(caches) and all(
            getattr(cache, "is_croppable", False)
            # Windows and convolutions keep no more than they need.
            and not any(hasattr(layer, "activate_past_recording") for layer in cache.layers)
            for cache in caches
        )

    def crop(self, columns: int) -> None:
        """Forget the last columns."""
        for name, value in self.arguments.items():
            if isinstance(value, Cache):
                value.crop(-columns)
            elif name in _BY_COLUMN and isinstance(value, Tensor):
                self.arguments[name] = value[..., :-columns]

    def select(self, index: Tensor, rows: int) -> DecodingState | None:
        """Its rows ``index``, which replace it; None where rows cannot be told apart."""
        arguments = dict(self.arguments)
        for name, value in self.arguments.items():
            if isinstance(value, Cache):
                try:
                    _reorder(value)(index)
                except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError):
                    return None
            elif isinstance(value, Tensor):
                # Positions may come as [kinds, rows, columns].
                axis = value.dim() - 2 if name == "position_ids" else 0
                if value.shape[axis] == rows:
                    arguments[name] = value.index_select(axis, index)
            elif value is not None and not isinstance(value, (bool, int, float, str)):
                return None
        self.arguments = arguments
        return self


def _reorder(cache: Cache) -> Any:
    """The method that picks a cache's rows: of two, the one that its own class has written."""
    names = ("reorder_cache", "batch_select_indices")
    classes = type(cache).__mro__
    return getattr(cache, next(n for cls in classes for n in names if n in vars(cls)))


_BY_COLUMN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
_SLICES = (
    "next_sequence_length"
    in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def has_rotary(model: Any) -> bool:
    """Whether positions become angles, which there are for any position."""
    return any(
        name.endswith("inv_freq")
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
    )


@torch.inference_mode(False)  # what is set here must be good outside of it
def reset_rotary(model: Any) -> None:
    """Forget the lengths that rotary embeddings of type ``dynamic`` have grown to."""
    for module in model.modules():
        if "dynamic" not in str(getattr(module, "rope_type", "")):
            continue
        for name in [key for key in vars(module) if key.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, buffer in list(module.named_buffers(recurse=False)):
            before = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            if name.endswith("inv_freq") and "original" not in name and before is not None:
                setattr(module, name, before.to(buffer.device, copy=True))

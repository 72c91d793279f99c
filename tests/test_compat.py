"""What transformers calls things, by version; and its private names are still there."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import transformers
from models import PAD, base_model, greedy, make_model, proxy_model
from packaging.version import Version
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from tta_ext import KnapsackDeferral
from tta_ext.decoding.runtime import compat
from tta_ext.decoding.runtime.cache import Plan, RaggedCache, RaggedLayer

INSTALLED = Version(transformers.__version__)
PROMPT = [5, 6, 7, 8]


def handed_over(**options: Any) -> dict[str, Any]:
    """What ``generate`` hands to a decoding method besides its named arguments."""
    seen: dict[str, Any] = {}

    def method(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs)
        return input_ids

    base_model().generate(
        torch.tensor([PROMPT]), custom_generate=method, max_new_tokens=2, pad_token_id=PAD,
        **options,
    )  # fmt: skip
    return seen


def cache_given() -> tuple[str, Any, bool]:
    return compat.passed_cache(handed_over(**{compat.cache_argument(base_model()): DynamicCache()}))


# What, the version in which it moved, what it was, what it is, where to look.
MOVED: dict[str, tuple[str, Any, Any, Any]] = {
    "what get_mask_sizes is told": (
        "5.4",
        "cache_position",
        "query_length",
        lambda: list(inspect.signature(CacheLayerMixin.get_mask_sizes).parameters)[1],
    ),
    "a layer's abstract limit": (
        "5.13",
        {"get_max_cache_shape"},
        {"get_max_length"},
        lambda: {name for name in CacheLayerMixin.__abstractmethods__ if "max" in name},
    ),
    "whether generate tells whose cache it is": ("5.17", False, True, lambda: cache_given()[2]),
    "the forward's argument": (
        "5.24", "past_key_values", "cache", lambda: compat.cache_argument(base_model()),
    ),
    "what generate hands over": ("5.24", "past_key_values", "cache", lambda: cache_given()[0]),
}  # fmt: skip


@pytest.mark.parametrize("what", MOVED)
def test_version_in_which_a_name_moved(what: str) -> None:
    version, before, since, look = MOVED[what]
    assert look() == (before if Version(version) > INSTALLED else since)


def test_private_names_are_there() -> None:
    mamba = transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
    assert compat.is_recurrent(transformers.MambaForCausalLM(mamba))
    assert not compat.is_recurrent(base_model())
    for kind in ("llama", "llama-eager"):
        chosen = compat.attention_implementation(make_model(kind).config)
        assert chosen == ("eager" if kind == "llama-eager" else "sdpa")
    assert not compat.passed_cache(handed_over())[2]


def test_the_ragged_cache_is_a_cache_of_transformers() -> None:
    cache = RaggedCache(2, 4)
    layer = RaggedLayer(cache)
    cache.ragged.append(layer)
    assert CacheLayerMixin.__abstractmethods__ <= set(dir(layer))
    cache.plan = Plan(torch.arange(6), 2, 3, fresh=True)
    for queries in (3, torch.arange(3)):  # how many, or where they stand
        assert cache.get_mask_sizes(queries) == layer.get_mask_sizes(queries) == (3, 0)
    assert not cache.is_compileable
    assert list(cache.is_sliding) == [False]
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1


def renamed(argument: str) -> Any:
    """A Llama whose forward, behind a decorator, takes its cache under one name only."""
    model = make_model(seed=0)
    inner, own = model.forward, compat.cache_argument(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        assert kwargs.keys() & set(compat.CACHE_ARGUMENTS) <= {argument}
        if argument in kwargs:
            kwargs[own] = kwargs.pop(argument)
        return inner(*args, **kwargs)

    signature = inspect.signature(inner)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            p.replace(name=argument) if p.name == own else p for p in signature.parameters.values()
        ]
    )
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    return model


@pytest.mark.parametrize("argument", compat.CACHE_ARGUMENTS)
def test_models_of_either_name(argument: str) -> None:
    model = renamed(argument)
    assert compat.cache_argument(model) == argument
    kad = KnapsackDeferral(model, proxy_model(), rule="threshold", param=0.0)
    answer = kad.generate([PROMPT], max_new_tokens=6, do_sample=False, eos_token_id=[])
    assert answer.tokens == [greedy(base_model(), PROMPT, 6)]

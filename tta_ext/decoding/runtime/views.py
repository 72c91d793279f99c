"""What people wrap a transformers model in, and the model inside that ``generate`` runs.

``torch.compile(model)`` is unwrapped, as its ``generate`` does. A peft model is its base model with
adapters in the layers: a :class:`AdapterView` switches them for its own forwards, so one set of
weights can be the base (adapters off) and the proxy (one on).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["AdapterView", "adapter_pair", "as_model", "share_weights"]

# What peft's layers call their state.
_OFF, _ACTIVE = "_disable_adapters", "_active_adapter"


class AdapterView:
    """A model whose adapters are on or off during its forwards, whatever they are otherwise.

    Everything else is the model's own.

    Args:
        inner: a transformers model with adapters of peft in its layers.
        adapter: the adapters that are on; None turns all off.
    """

    def __init__(self, inner: Any, adapter: list[str] | None) -> None:
        self.inner, self.adapter = inner, adapter
        self._layers = _adapter_layers(inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._switched():
            return self.inner(*args, **kwargs)

    @contextmanager
    def _switched(self) -> Iterator[None]:
        wanted = {_OFF: self.adapter is None} | (
            {} if self.adapter is None else {_ACTIVE: self.adapter}
        )
        before = []
        for layer in self._layers:
            for name, value in wanted.items():
                now = getattr(layer, name)
                if now != value and not (name == _ACTIVE and [now] == value):
                    before.append((layer, name, now))
                    setattr(layer, name, value)
        try:
            yield
        finally:
            for layer, name, value in before:
                setattr(layer, name, value)


def _adapter_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, _OFF)]


def _inner(model: Any) -> Any:
    """The transformers model in a wrapper; the model itself if there is none."""
    if hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
        return model.get_base_model()
    # Wrappers hand ``generate`` on to the model that it belongs to.
    owner = getattr(getattr(model, "generate", None), "__self__", model)
    return owner if isinstance(owner, nn.Module) else model


def as_model(model: Any, role: str, adapter: str | None = None) -> Any:
    """The model to run for one that may be wrapped.

    Args:
        model: a transformers model, compiled or not, or a peft model.
        role: what messages call it.
        adapter: name of the adapter to turn on; None: those that are on now.

    Raises:
        ValueError: there is no such adapter, or it is not one that lives in the layers.
    """
    if not isinstance(model, nn.Module):
        return model
    inner = _inner(model)
    configs = getattr(model, "peft_config", None) or {}
    if adapter is not None and adapter not in configs:
        raise ValueError(
            f"{role} has no adapter {adapter!r}, expected one of {', '.join(configs) or 'none'}"
        )
    if adapter is None and (inner is model or not configs):
        return inner
    active = [adapter] if adapter is not None else _active(model)
    for name in active:
        if getattr(configs.get(name), "is_prompt_learning", False):
            raise ValueError(
                f"{role} has the adapter {name!r} of type "
                f"{getattr(configs[name], 'peft_type', '?')}, which adds virtual tokens; "
                "merge it into a prompt or train one of another type, such as LoRA"
            )
    layers = _adapter_layers(inner)
    if not layers:
        return inner
    return AdapterView(inner, None if adapter is None and _all_off(layers) else active)


def _active(model: Any) -> list[str]:
    """Names of the adapters that are on: a property of peft's models, a method of others."""
    names = model.active_adapters
    return list(names() if callable(names) else names)


def _all_off(layers: list[Any]) -> bool:
    return all(getattr(layer, _OFF) for layer in layers)


def adapter_pair(model: Any, adapter: str) -> tuple[Any, Any]:
    """Base and proxy in one set of weights: the model with its adapters off, and with one on.

    Raises:
        ValueError: the model has no such adapter.
    """
    proxy = as_model(model, "base", adapter)
    return AdapterView(proxy.inner, None), proxy


def share_weights(base: Any, proxy: Any) -> Any:
    """The base to run beside a proxy that may live in its weights.

    peft puts an adapter into the layers of the model that it is made for, so what was the base is
    the adapted model unless the adapter is off for the base's forwards.

    Args:
        base, proxy: as :func:`as_model` gives them.

    Raises:
        ValueError: both are the same adapted model.
    """
    inner = getattr(base, "inner", base)
    if inner is not getattr(proxy, "inner", proxy) or not isinstance(inner, nn.Module):
        return base
    if not _adapter_layers(inner):
        return base
    if not isinstance(base, AdapterView) and isinstance(proxy, AdapterView):
        if proxy.adapter is not None:
            return AdapterView(inner, None)
    elif isinstance(base, AdapterView) and base.adapter != proxy.adapter:
        return base
    raise ValueError(
        "base and proxy are the same model with the same adapter in its layers; pass the peft "
        "model with adapter=, which turns the adapter off for the base"
    )

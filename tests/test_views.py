"""Models in wrappers: compiled, with adapters, quantised, offloaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    NEW,
    answer,
    base_model,
    greedy,
    make_model,
    make_tokenizer,
    proxy_model,
    ragged_prompts,
)
from searches import SMALL, tokens_of, vowels
from torch import nn

from tta_ext import AdaptiveImportanceSampling, KnapsackDeferral
from tta_ext.decoding.runtime.views import AdapterView, as_model


class Adapted(nn.Module):
    """A linear layer with adapters, switched as peft's are."""

    def __init__(self, inner: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner = inner
        self._disable_adapters, self._active_adapter = False, [names[0]]
        generator = torch.Generator().manual_seed(5)
        shape = (len(names), inner.out_features, inner.in_features)
        deltas = 0.3 * torch.randn(shape, generator=generator)
        self.delta = dict(zip(names, deltas, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        if not self._disable_adapters:
            for name in self._active_adapter:
                out = out + x @ self.delta[name].T
        return out


class Wrapper(nn.Module):
    """What peft puts around a model."""

    def __init__(self, model: Any, kind: str = "LORA", *names: str) -> None:
        super().__init__()
        self.base_model, names = model, names or ("one", "two")
        prompt = kind != "LORA"
        config = SimpleNamespace(peft_type=kind, is_prompt_learning=prompt)
        self.peft_config = dict.fromkeys(names, config)
        self.active_adapters = [names[0]]
        if not prompt:
            for layer in model.model.layers:
                layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj, names)

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def merged(name: str) -> Any:
    """The model with an adapter's weights added to its own."""
    model = make_model(seed=0)
    adapted = Wrapper(make_model(seed=0)).base_model
    for layer, other in zip(model.model.layers, adapted.model.layers, strict=True):
        with torch.no_grad():
            layer.self_attn.q_proj.weight += other.self_attn.q_proj.delta[name]
    return model


@pytest.mark.parametrize("name", ["one", "two"])
def test_base_and_adapter_in_one_set_of_weights(name: str) -> None:
    wrapped = Wrapper(make_model(seed=0))
    kad = KnapsackDeferral(wrapped, adapter=name, rule="threshold", param=0.0)
    apart = KnapsackDeferral(base_model(), merged(name), rule="threshold", param=0.0)
    for param in (0.0, 1.01):
        found = answer(kad, do_sample=False, param=param).tokens
        assert found == answer(apart, do_sample=False, param=param).tokens
    layer = wrapped.base_model.model.layers[0].self_attn.q_proj
    assert (layer._disable_adapters, layer._active_adapter) == (False, ["one"])


def test_the_base_that_an_adapter_was_put_into_runs_without_it() -> None:
    base = make_model(seed=0)
    wrapped = Wrapper(base)
    kad = KnapsackDeferral(base, wrapped, rule="threshold", param=0.0)
    plain = KnapsackDeferral(base_model(), proxy_model(), rule="threshold", param=0.0)
    found = answer(kad, do_sample=False).tokens
    assert found == answer(plain, do_sample=False).tokens
    assert answer(kad, do_sample=False, param=1.01).tokens != found
    with pytest.raises(ValueError, match="same model with the same adapter"):
        KnapsackDeferral(base, base)
    with pytest.raises(ValueError, match="same model with the same adapter"):
        KnapsackDeferral(wrapped, wrapped)


def test_adapters_that_are_refused() -> None:
    with pytest.raises(ValueError, match="has no adapter 'three', expected one of one, two"):
        KnapsackDeferral(Wrapper(make_model(seed=0)), adapter="three")
    with pytest.raises(ValueError, match="PREFIX_TUNING, which adds virtual tokens"):
        KnapsackDeferral(base_model(), Wrapper(make_model(seed=0), "PREFIX_TUNING"))
    with pytest.raises(ValueError, match="expected either proxy or adapter"):
        KnapsackDeferral(base_model())


def test_compiled_models() -> None:
    plain = KnapsackDeferral(base_model(), proxy_model())
    compiled = torch.compile(make_model(seed=0), backend="eager")
    assert as_model(compiled, "base") is compiled._orig_mod
    assert answer(KnapsackDeferral(compiled, proxy_model())).tokens == answer(plain).tokens


def rollouts(model: Any) -> list[list[int]]:
    """What AISP draws under its default noise."""
    options: Any = SMALL | {"n": 4, "iterations": 2}
    search = AdaptiveImportanceSampling(model, vowels, make_tokenizer(), **options)
    return tokens_of(search.generate("a", seed=0))[0]


def quantised(library: str) -> Any:
    """The base with weights that a library packs; skipped without it."""
    module, model = pytest.importorskip(library), make_model(seed=0)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
        return model
    for layer in model.model.layers:
        before = layer.self_attn.q_proj
        after = module.nn.Linear8bitLt(
            before.in_features, before.out_features, bias=False, has_fp16_weights=False
        )
        after.load_state_dict(before.state_dict())
        layer.self_attn.q_proj = after.to("cpu")
    return model


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_quantised_weights(library: str) -> None:
    model = quantised(library)
    kad = KnapsackDeferral(model, proxy_model(), rule="threshold", param=0.0)
    expected = [greedy(model, prompt, NEW) for prompt in ragged_prompts()]
    assert answer(kad, do_sample=False).tokens == expected
    assert len({tuple(tokens) for tokens in rollouts(model)}) > 1


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model(seed=0)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    kad = KnapsackDeferral(model, proxy_model(), rule="threshold", param=0.3)
    plain = KnapsackDeferral(base_model(), proxy_model(), rule="threshold", param=0.3)
    assert answer(kad).tokens == answer(plain).tokens
    assert rollouts(model) == rollouts(base_model())


def test_a_view_is_its_model_otherwise() -> None:
    view = as_model(Wrapper(make_model(seed=0)), "proxy")
    assert isinstance(view, AdapterView)
    assert "LlamaForCausalLM" in repr(KnapsackDeferral(base_model(), view))
    assert len(answer(KnapsackDeferral(base_model(), view)).tokens) == len(ragged_prompts())

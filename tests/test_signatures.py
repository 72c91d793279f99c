"""What editors, help() and type checkers see of the public calls, and rules handed down whole."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from models import base_model, proxy_model, ragged_prompts

import tta_ext
from tta_ext.decoding import (
    AdaptiveImportanceSampling,
    BestOfN,
    ChunkBeamSearch,
    KnapsackDeferral,
    ReControlSearch,
    RewardGuidedSearch,
)

METHODS = (
    AdaptiveImportanceSampling,
    BestOfN,
    ChunkBeamSearch,
    ReControlSearch,
    RewardGuidedSearch,
)


def test_signatures_name_every_argument() -> None:
    from tta_ext.decoding.deferral.options import GenerationOptions

    assert set(GenerationOptions.__annotations__) <= set(
        inspect.signature(KnapsackDeferral.generate).parameters
    )
    assert "critical" in inspect.signature(KnapsackDeferral.from_pretrained).parameters
    assert "input_ids" not in inspect.signature(KnapsackDeferral.chat).parameters
    for function in (KnapsackDeferral.generate, KnapsackDeferral.stream, KnapsackDeferral.chat):
        parameters = inspect.signature(function).parameters
        assert {"max_new_tokens", "stop_strings", "errors", "num_return_sequences"} <= set(
            parameters
        )
        assert parameters["max_new_tokens"].default == 128
    for method in METHODS:
        for function in (method.__init__, method.start, method.generate):
            parameters = inspect.signature(function).parameters
            fields = method.settings_type.__dataclass_fields__
            assert set(fields) <= set(parameters), function
            assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    assert inspect.signature(AdaptiveImportanceSampling.generate).parameters["n"].default == 16
    assert inspect.signature(BestOfN.generate).parameters["n"].default == 32


def test_typed_keywords_are_the_real_ones() -> None:
    from tta_ext.decoding.deferral import options as deferral_options
    from tta_ext.decoding.deferral import request
    from tta_ext.decoding.search import (
        aisp_settings,
        best_of_n,
        chunk_beam,
        re_control,
        reward_guided,
    )

    known = set(inspect.signature(request.Request).parameters) - {
        "models", "rule", "memories", "prompts",
    }  # fmt: skip
    more = {"rule", "param", "critical", "temperature", "rule_temperature", "num_assistant_tokens"}
    assert set(deferral_options.GenerationOptions.__annotations__) == known | more
    for settings, options in (
        (aisp_settings.AISPSettings, aisp_settings.AISPOptions),
        (best_of_n.BestOfNSettings, best_of_n.BestOfNOptions),
        (chunk_beam.ChunkBeamSettings, chunk_beam.ChunkBeamOptions),
        (re_control.ReControlSettings, re_control.ReControlOptions),
        (reward_guided.RewardGuidedSettings, reward_guided.RewardGuidedOptions),
    ):
        fields = settings.__dataclass_fields__
        assert set(options.__annotations__) == set(fields), settings
        types: dict[str, Any] = {}
        for one in reversed(options.__mro__ if options.__mro__[1] is not dict else [options]):
            types |= getattr(one, "__annotations__", {})
        for name, annotation in types.items():
            text = getattr(annotation, "__forward_arg__", annotation)
            assert text == fields[name].type, name


def test_a_rule_object_is_handed_down_whole() -> None:
    prompts, keys = ragged_prompts(), {"seed": 3, "max_new_tokens": 6, "eos_token_id": []}
    rule = tta_ext.Rule("knapsack", 0.3, critical="split", rule_temperature=0.8)
    kad = KnapsackDeferral(base_model(), proxy_model(), rule=rule)
    named = KnapsackDeferral(
        base_model(), proxy_model(), rule="primal", param=0.3, critical="split",
        rule_temperature=0.8,
    )  # fmt: skip
    assert kad.rule == named.rule == rule
    expected = named.generate(prompts, **keys)
    assert kad.generate(prompts, **keys).tokens == expected.tokens
    plain = KnapsackDeferral(base_model(), proxy_model())
    assert plain.generate(prompts, rule=rule, **keys).tokens == expected.tokens
    assert plain.generate(prompts, rule=rule, num_assistant_tokens=3, **keys).tokens == (
        expected.tokens
    )
    for call in (
        lambda: KnapsackDeferral(base_model(), proxy_model(), rule=rule, param=0.2),
        lambda: plain.generate(prompts, rule=rule, temperature=0.5),
    ):
        with pytest.raises(ValueError, match="rule is a Rule, which brings param"):
            call()
    with pytest.raises(ValueError, match="speculative and num_assistant_tokens are one argument"):
        plain.generate(prompts, speculative=2, num_assistant_tokens=2)
    with pytest.raises(ValueError, match=r"param is 0\.3, expected None for rule 'argmax'"):
        plain.generate(prompts, rule="argmax", param=0.3)


def test_methods_of_users_keep_their_own_signatures() -> None:
    class Mixin(AdaptiveImportanceSampling):
        def generate(self, prompts: Any) -> Any:  # type: ignore[override]
            return super().generate(prompts)

    assert list(inspect.signature(Mixin.generate).parameters) == ["self", "prompts"]
    assert inspect.signature(Mixin.start).parameters["n"].default == 16

"""Models that cannot be ragged: in lock-step, as ``generate`` runs them; and who runs how."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import (
    EOS,
    NEW,
    PAD,
    VOCABULARY,
    answer,
    base_model,
    greedy,
    make_model,
    make_tokenizer,
    next_logits,
    proxy_model,
    ragged_prompts,
)
from searches import SMALL, tokens_of, vowels

from tta_ext import AdaptiveImportanceSampling, BestOfN, KnapsackDeferral, hf
from tta_ext.decoding.runtime import compat
from tta_ext.decoding.runtime.fit import fit_model
from tta_ext.decoding.runtime.lockstep import LockstepRunner
from tta_ext.decoding.runtime.models import position_limit
from tta_ext.decoding.runtime.vocabulary import Vocabulary, align_vocabularies
from tta_ext.decoding.search.scales import head_row_norm, noise_gain

ROPE = {"rope_theta": 1e4}


def model_of(config: str, seed: int = 0, **options: Any) -> Any:
    """A small model of a configuration class."""
    torch.manual_seed(seed)
    ids = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": PAD}
    made = getattr(transformers, config)(**ids | options)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(0, 0.22)
    return model


def mamba(seed: int = 0) -> Any:
    return model_of("MambaConfig", seed, hidden_size=32, num_hidden_layers=2, state_size=8)


def bloom(seed: int = 0) -> Any:
    return model_of("BloomConfig", seed, hidden_size=32, n_layer=2, n_head=4)


@torch.inference_mode()
def batch_greedy(model: Any, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """What ``generate`` answers to a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None,
        pad_token_id=PAD,
    )  # fmt: skip
    return out[:, width:].tolist()


@pytest.mark.parametrize("make", [mamba, bloom])
def test_both_models_in_lockstep_answer_as_generate(make: Any) -> None:
    base, proxy = make(0), make(1)
    kad = KnapsackDeferral(base, proxy, rule="threshold", param=0.0)
    assert repr(kad).count("(lockstep)") == 2
    for param, model in ((0.0, base), (1.01, proxy)):
        found = answer(kad, do_sample=False, param=param)
        assert found.tokens == batch_greedy(model, ragged_prompts())
        assert found.stats.runners == {"base": "lockstep", "proxy": "lockstep"}
        assert found.stats.proxy_calls_saved == found.stats.proxy_rows_saved == 0
        assert found.stats.proxy_calls == found.stats.base_calls == NEW


@pytest.mark.parametrize("rule", ["threshold", "confidence_bet", "implicit_reward"])
def test_lockstep_draws_what_ragged_rows_draw(rule: str) -> None:
    param = 0.7 if rule == "implicit_reward" else 0.3
    made = [
        KnapsackDeferral(base_model(), proxy_model(), rule=rule, param=param, runner=runner)
        for runner in ("ragged", "lockstep")
    ]
    # Rows leave at different steps.
    ends = {"eos_token_id": list(range(40, 60)), "max_new_tokens": 20}
    ragged, lockstep = (answer(kad, **ends) for kad in made)
    assert len({len(tokens) for tokens in ragged.tokens}) > 1
    assert lockstep.tokens == ragged.tokens
    assert lockstep.deferred == ragged.deferred


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_model_ragged_and_the_other_in_lockstep(order: tuple[int, int]) -> None:
    models = [bloom(), base_model()]
    base, proxy = (models[i] for i in order)
    kad = KnapsackDeferral(base, proxy, rule="threshold", param=0.3)
    together = answer(kad)
    assert sorted(together.stats.runners.values()) == ["lockstep", "ragged"]
    alone = [
        answer(kad, [prompt], sequence=[i]).tokens[0] for i, prompt in enumerate(ragged_prompts())
    ]
    assert together.tokens == alone


@pytest.mark.parametrize(
    ("rule", "base", "proxy"),
    [
        ("threshold", bloom, bloom),
        ("threshold", bloom, make_model),
        ("threshold", make_model, bloom),
        ("confidence_bet", bloom, make_model),
        ("implicit_reward", bloom, bloom),
    ],
)
def test_drafts_in_lockstep_change_no_token(rule: str, base: Any, proxy: Any) -> None:
    param = 0.7 if rule == "implicit_reward" else 0.3
    kad = KnapsackDeferral(base(seed=0), proxy(seed=1), rule=rule, param=param)
    # Rows leave at different steps.
    ends = {"eos_token_id": list(range(40, 60)), "max_new_tokens": 20}
    for options in ({"do_sample": False}, ends):
        plain = answer(kad, **options)
        for draft in ("proxy", "base"):
            drafts = answer(kad, speculative=3, draft=draft, **options)
            assert drafts.stats.draft_tokens > 0
            assert (drafts.tokens, drafts.deferred) == (plain.tokens, plain.deferred)


def test_copied_drafts_in_lockstep_change_no_token() -> None:
    kad = KnapsackDeferral(bloom(), bloom(1), rule="threshold", param=0.0)
    # Long enough to repeat itself.
    options: Any = {"do_sample": False, "max_new_tokens": 60}
    plain = answer(kad, [[20, 21]], **options)
    drafts = answer(kad, [[20, 21]], speculative=3, draft="lookup", **options)
    assert drafts.stats.draft_tokens > 0
    assert drafts.tokens == plain.tokens


def test_drafts_in_lockstep_save_forwards() -> None:
    kad = KnapsackDeferral(bloom(), bloom(), rule="threshold", param=0.3)
    found = answer(kad, ragged_prompts()[:1], speculative=3, do_sample=False)
    assert found.stats.accepted_tokens > found.stats.draft_tokens // 2
    assert found.stats.base_calls < NEW


def test_nothing_is_drafted_where_a_state_cannot_be_read_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kad = KnapsackDeferral(base_model(), mamba(), rule="threshold", param=0.3)
    with caplog.at_level(logging.WARNING, "tta_ext"):
        drafts = answer(kad, speculative=3)
        answer(kad, speculative=3)
    assert drafts.tokens == answer(kad).tokens
    note = "nothing is drafted: proxy (MambaForCausalLM) in lock-step"
    assert drafts.stats.speculation.startswith(note)
    assert sum(note in message for message in caplog.messages) == 1


def test_a_cache_without_an_order_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kad = KnapsackDeferral(bloom(), bloom(1), rule="threshold", param=0.3)
    ends = {"eos_token_id": list(range(40, 70)), "max_new_tokens": 20}
    expected = answer(kad, **ends)
    monkeypatch.setattr(compat.DecodingState, "select", lambda self, index, rows: None)
    found = answer(kad, **ends)
    assert found.tokens == expected.tokens
    assert found.stats.base_tokens > expected.stats.base_tokens


@pytest.mark.parametrize("make", [mamba, bloom, lambda: make_model("llama")])
def test_searches_in_lockstep(make: Any) -> None:
    model, prompts = make(), ["hello", "a", "the cat"]
    options: Any = SMALL | {"runner": "lockstep", "decoding": "sample"}
    best = BestOfN(model, vowels, make_tokenizer(), n=8, group=4, **options)
    aisp = AdaptiveImportanceSampling(
        model, vowels, make_tokenizer(), n=4, iterations=2, sigma=0.0, **options
    )
    assert "(lockstep)" in repr(aisp)
    found = best.generate(prompts, seed=0)
    assert tokens_of(aisp.generate(prompts, seed=0)) == tokens_of(found)
    noisy = aisp.generate(prompts, seed=0, sigma=None, decoding="greedy")
    assert len({tuple(tokens) for tokens in tokens_of(noisy)[0]}) > 1
    if model.config.model_type == "llama":
        options["runner"] = None
        ragged = BestOfN(model, vowels, make_tokenizer(), n=8, group=4, **options)
        assert tokens_of(ragged.generate(prompts, seed=0)) == tokens_of(found)


def test_a_conversation_in_lockstep() -> None:
    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
    tokenizer, turns = make_tokenizer(template=template), ["hi", "and then", "why"]
    said = []
    for runner in ("ragged", "lockstep"):
        kad = KnapsackDeferral(base_model(), proxy_model(), tokenizer, runner=runner)
        chat = kad.chat(max_new_tokens=5, seed=0, eos_token_id=[])
        said.append([chat.send(turn) for turn in turns])
    assert said[0] == said[1]


def test_generate_with_a_recurrent_base() -> None:
    base, proxy = mamba(), mamba(1)
    ids = torch.tensor([[PAD, PAD, 20, 21], [30, 31, 32, 33]])
    mask = (ids != PAD).long()
    options: Any = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False,
                    "eos_token_id": None, "pad_token_id": PAD}  # fmt: skip
    found = base.generate(ids, custom_generate=hf.kad, proxy_model=proxy, param=0.0, **options)
    assert found.tolist() == base.generate(ids, **options).tolist()
    options |= {"custom_generate": hf.kad, "proxy_model": proxy, "runner": "ragged"}
    with pytest.raises(ValueError, match="keeps a recurrent state"):
        base.generate(ids, **options)


def test_heads_of_several_codebooks_are_refused() -> None:
    config = transformers.MusicgenDecoderConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.MusicgenForCausalLM(config)
    with pytest.raises(ValueError, match=r"base \(MusicgenForCausalLM\) has 4 heads, of codes"):
        KnapsackDeferral(model, base_model())


def test_runners_can_be_forced_or_not() -> None:
    with pytest.raises(ValueError, match=r"base \(MambaForCausalLM\) keeps a recurrent state"):
        KnapsackDeferral(mamba(), base_model(), runner="ragged")
    with pytest.raises(ValueError, match="runner is 'fast', expected None or one of ragged"):
        KnapsackDeferral(base_model(), proxy_model(), runner="fast")


# ---- positions -----------------------------------------------------------------------------------


def scaled(kind: str, seed: int = 0, limit: int = 16) -> Any:
    """A model whose rotary factors follow the longest row."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if kind == "longrope":
        rope = ROPE | {
            "rope_type": kind, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
            "factor": 32.0, "original_max_position_embeddings": limit,
        }  # fmt: skip
        return model_of("Phi3Config", seed, **sizes, max_position_embeddings=512,
                        original_max_position_embeddings=limit, rope_parameters=rope)  # fmt: skip
    rope = ROPE | {"rope_type": kind, "factor": 4.0}
    return model_of(
        "LlamaConfig", seed, **sizes, max_position_embeddings=limit, rope_parameters=rope
    )


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_long_rows_do_not_change_short_ones(kind: str) -> None:
    base, proxy = scaled(kind), scaled(kind, 1)
    prompts = [list(range(30, 36)), list(range(10, 50)), list(range(50, 56)), list(range(60, 74))]
    kad = KnapsackDeferral(base, proxy, rule="threshold", param=0.0)
    assert fit_model(base, "base").reach == 16
    found = answer(kad, prompts, do_sample=False)
    assert found.stats.runners["base"] == "lockstep"
    assert found.tokens == [greedy(base, prompt, NEW) for prompt in prompts]
    # Where no row gets that far they share forwards.
    assert answer(kad, [[5, 6], [7]], do_sample=False).stats.runners["base"] == "ragged"
    options: Any = SMALL | {"n": 2, "probe": True}
    search = BestOfN(base, lambda p, r: [float(len(set(x))) for x in r], **options)
    together = search.generate(prompts, seed=0, sequence=[0, 1, 2, 3])
    alone = [
        tokens_of(search.generate([prompt], seed=0, sequence=[i]))[0]
        for i, prompt in enumerate(prompts)
    ]
    assert tokens_of(together) == alone


def test_scaled_positions_reach_as_far_as_their_factor() -> None:
    assert position_limit(scaled("dynamic")) is None
    assert position_limit(scaled("linear")) == 64
    assert position_limit(scaled("yarn")) == 64
    assert position_limit(scaled("longrope")) == 512
    endless = transformers.XLNetConfig()  # relative positions
    assert position_limit(SimpleNamespace(config=endless)) is None


# ---- what is no reason to refuse ---------------------------------------------------------------


def test_another_attention_is_switched_to_one_with_masks(caplog: Any) -> None:
    model = make_model(seed=3)
    model.config._attn_implementation = "flash_attention_2"
    with caplog.at_level(logging.WARNING, "tta_ext"):
        assert fit_model(model, "base").kind == "ragged"
    assert "it has been switched to" in caplog.text
    assert compat.attention_implementation(model.config) == "sdpa"


def test_keys_without_gaps_for_models_that_view_them() -> None:
    sizes = {"hidden_size": 32, "intermediate_multiple_size": 2, "num_hidden_layers": 2}
    model = model_of("GPTNeoXJapaneseConfig", **sizes, num_attention_heads=4)
    fit = fit_model(model, "base")
    assert (fit.kind, fit.contiguous) == ("ragged", True)
    kad = KnapsackDeferral(model, model, rule="threshold", param=0.0)
    expected = [greedy(model, prompt, NEW) for prompt in ragged_prompts()]
    assert answer(kad, do_sample=False).tokens == expected


def test_special_ids_beyond_the_logits_are_never_drawn() -> None:
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert align_vocabularies(size, size + 20, tokenizer) == Vocabulary(size)
    tokenizer.add_tokens(["word"])
    with pytest.raises(ValueError, match="first without a logit: '<image>'"):
        align_vocabularies(size, size, tokenizer)


def test_autocast() -> None:
    kad = KnapsackDeferral(base_model(), proxy_model(), rule="threshold", param=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [len(tokens) for tokens in answer(kad).tokens] == [NEW] * len(ragged_prompts())


def test_noise_is_measured_behind_the_head() -> None:
    plain = base_model()
    assert noise_gain(plain) == head_row_norm(plain)
    for config, name, scale in (
        ("CohereConfig", "logit_scale", 0.125), ("GraniteConfig", "logits_scaling", 8.0),
    ):  # fmt: skip
        model = model_of(
            config, **{name: scale}, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        assert noise_gain(model) == pytest.approx(head_row_norm(model) / 8, rel=1e-4)


@torch.inference_mode()
def test_lockstep_rows_are_copies_of_what_they_come_from() -> None:
    model = mamba()
    source = LockstepRunner(model, [[5, 6, 7], [8]], room=0, vocabulary=VOCABULARY)
    source.hold()
    first, again = source.step(), source.step()
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    rows = LockstepRunner(model, [], room=0, vocabulary=VOCABULARY)
    rows.adopt(source, [0, 0, 1], 4)
    for tokens in ([20, 21, 22], [30, 31, 32]):
        rows.append(tokens)
        logits = rows.step()
    for row, prompt in enumerate(([5, 6, 7, 20, 30], [5, 6, 7, 21, 31], [8, 22, 32])):
        torch.testing.assert_close(logits[row], next_logits(model, prompt)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(source.step(), first, rtol=0, atol=0)

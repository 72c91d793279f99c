"""What the tests of search methods share: prompts, a reward, small runs."""

from __future__ import annotations

from typing import Any

from models import base_model, make_tokenizer

from tta_ext.decoding import AdaptiveImportanceSampling

PROMPTS = ["hello there", "ab", "what is it"]
SMALL = {"max_new_tokens": 8, "eos_token_id": [], "probe": False}


def vowels(prompts: list[Any], responses: list[str]) -> list[float]:
    """Share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


def make_aisp(
    model: Any = None, reward: Any = vowels, **options: Any
) -> AdaptiveImportanceSampling:
    """A small AISP without coherent noise."""
    settings = SMALL | {"n": 4, "iterations": 3, "sigma": 0.4, "coherence": 0.0} | options
    model = base_model() if model is None else model
    return AdaptiveImportanceSampling(model, reward, make_tokenizer(), **settings)


def tokens_of(result: Any) -> list[list[list[int]]]:
    """Those of each prompt's candidates."""
    return [[one.tokens for one in row] for row in result.candidates]

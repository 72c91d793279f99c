"""Prompts answered by a pair in vLLM, whose engine is a fake here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commands import call, lines
from foreign import BASE, PROXY

from tta_ext.decoding import load_tokenizer
from tta_ext.demo.pair import ASSETS
from tta_ext.engines.rows import Asked
from tta_ext.engines.vllm.pair import PROCESSOR
from tta_ext.rules import Rule


class Engine:
    """``vllm.LLM``: continues a request by the ids 5, 6, ... that its parameters allow."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options = model, options
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=16))

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.asked = list(zip(prompts, params, strict=True))
        return [SimpleNamespace(outputs=[self.answer(one)]) for one in params]

    def answer(self, params: Any) -> Any:
        ids = [5, 6, 7][: params.max_tokens]
        signs = [-1.0, 1.0, -1.0]
        by_length = len(ids) < 3
        return SimpleNamespace(
            token_ids=tuple(ids),
            text="five",
            logprobs=[{t: SimpleNamespace(logprob=0.5 * s)} for t, s in zip(ids, signs)],  # noqa: B905
            finish_reason="length" if by_length else "stop",
            stop_reason=None if by_length or not params.stop else params.stop[0],
        )


def test_prompts_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from tta_ext.engines.vllm.offline import OfflinePair

    vllm = ModuleType("vllm")
    vars(vllm).update(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    rule = Rule("knapsack", 0.5, critical="split", temperature=0.7)
    pair = OfflinePair(ASSETS / "base", rule, dtype="float32")
    found = pair.generate(
        ["Q: 1", [3, 4]], seed=9, sequence=[4, 5, 6, 7], num_return_sequences=2, max_new_tokens=2
    )
    assert pair.llm.options["logits_processors"] == [PROCESSOR]
    assert pair.llm.options["dtype"] == "float32"
    text = load_tokenizer(str(ASSETS / "base"))("Q: 1")["input_ids"]
    assert [one["prompt_token_ids"] for one, _ in pair.llm.asked] == [text, text, [3, 4], [3, 4]]
    for sequence, (_, params) in zip(found.sequence, pair.llm.asked, strict=True):
        asked = Asked.parse(params.extra_args, temperature=params.temperature)
        assert asked == Asked(rule, 9, sequence)
    assert found.tokens == [[5, 6]] * 4
    assert found.deferred == [[True, False]] * 4
    assert found.finish == ["length"] * 4
    assert (found.stats.tokens, found.stats.deferred_tokens) == (8, 4)
    more = {"seed": 9, "max_new_tokens": 3}
    assert pair.generate([[3]], **more).finish == ["eos"]
    assert pair.generate([[3]], stop_strings=["ive"], **more).finish == ["stop"]
    assert pair.generate([[3] * 13], **more).finish == ["eos"]
    with pytest.raises(ValueError, match=r"prompt 1 has 14 tokens .* max_model_len is 16"):
        pair.generate([[3], [3] * 14], **more)
    with pytest.raises(ValueError, match=r"temperature is 0.7, expected 1"):
        pair.generate([[3]], do_sample=False, **more)
    with pytest.raises(ValueError, match="shorter"):
        pair.generate([[3], [4]], sequence=[1], **more)


def test_a_record_names_the_engine(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vllm, out = ModuleType("vllm"), tmp_path / "out.jsonl"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    words = ["generate", "Q", "--seed", "1", "--backend", "vllm", "--base", str(BASE), "--proxy"]
    words += [str(PROXY), "--max-new-tokens", "2", "--output", str(out)]
    for version in ("1.2", "1.2", "1.3"):
        vars(vllm).update(LLM=Engine, SamplingParams=SimpleNamespace, __version__=version)
        assert call(capsys, *words)[0] == 0
    status, _, error = call(capsys, *words, "--greedy", "--temperature", "0.5")
    assert (status, "not answered" in error) == (1, False)
    models = [one["run"]["models"] for one in lines(out)]
    assert [(one["vllm"], one["tensor_parallel_size"]) for one in models] == [
        ("1.2", 1),
        ("1.3", 1),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs a rule, --base and --proxy"),
        (["--top-k", "3"], "--backend vllm does not use --top-k"),
        (["--base", str(BASE), "--proxy", str(PROXY)], "backend vllm needs vLLM: pip install"),
    ],
)
def test_the_command_with_vllm_behind_it(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    status, _, error = call(capsys, "generate", "Q", "--seed", "1", "--backend", "vllm", *words)
    assert status != 0
    assert told in " ".join(error.split())

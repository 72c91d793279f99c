"""What type checkers say about the public names; read by mypy (and pyright), never run.

Each wrong keyword carries an ignore, so a checker that warns of unused ignores fails once it no
longer finds the mistake.
"""

from __future__ import annotations

from typing import Any

import torch

import tta_ext
from tta_ext.decoding import AISPSearch, Generation, SearchResult


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(text.count("s")) for text in responses]


def words(prompts: list[str], responses: list[str]) -> list[int]:
    return [len(text.split()) for text in responses]


def tensor(prompts: list[Any], responses: list[Any]) -> torch.Tensor:
    return torch.zeros(len(responses))


def deferral(base: Any, proxy: Any, tokenizer: Any) -> Generation:
    rule = tta_ext.Rule("knapsack", 0.4, critical="split").replace(param=0.5)
    kad = tta_ext.KnapsackDeferral(base, proxy, tokenizer, rule=rule, num_assistant_tokens=4)
    kad = tta_ext.KnapsackDeferral.from_pretrained("base", "proxy", rule="threshold", param=0.4)
    for event in kad.stream("a", max_new_tokens=3, seed=torch.Generator()):
        print(event.text, event.deferred)
    kad.chat("be kind", seed=0, stop_strings=["\n"])
    tta_ext.KnapsackDeferral(base, proxy, tokeniser=tokenizer)  # type: ignore[call-arg]
    tta_ext.KnapsackDeferral.from_pretrained("base", "proxy", parm=0.4)  # type: ignore[call-arg]
    kad.generate("a", max_tokens=3)  # type: ignore[call-arg]
    kad.generate("a", max_new_tokens="3")  # type: ignore[arg-type]
    kad.stream("a", sead=0)  # type: ignore[call-arg]
    kad.chat("a", sead=0)  # type: ignore[call-arg]
    rule.replace(parm=0.5)  # type: ignore[call-arg]
    tta_ext.Rule("knapsack", critcal="split")  # type: ignore[call-arg]
    return kad.generate(["a", "b"], batch_size=2, max_new_tokens=3, trace="lazy", rule=rule)


def aisp(model: Any, tokenizer: Any) -> SearchResult:
    method = tta_ext.AdaptiveImportanceSampling
    method(model, lambda p, r: [float(len(x)) for x in r], tokenizer, n=4, iterations=2)
    method(model, letters, n=4, sigma=None, eos_token_id=[1, 2], chat_template="", probe=False)
    method(model, words, top_k=5)
    found = method(model, tensor, tokenizer, lam_unit="ess")
    search: AISPSearch = found.start("a", seed=0, iterations=3)
    for step in search:
        print(step.iteration, search.sigma)
    found.resume("file", iterations=9).save("file")
    method(model, letters, sgima=0.5)  # type: ignore[call-arg]
    method(model, letters, sigma="0.5")  # type: ignore[arg-type]
    method(model, lambda p: [1.0])  # type: ignore[arg-type,misc]
    method(model, lambda p, r: "good")  # type: ignore[arg-type,return-value]
    found.start("a", checkpoint="file")  # type: ignore[call-arg]
    found.generate("a", seeds=0)  # type: ignore[call-arg]
    found.generate("a", beams=3)  # type: ignore[call-arg]
    return found.generate(["a"], checkpoint="file", seed=0, sequence=[3], n=8)


def baselines(model: Any, tokenizer: Any) -> list[SearchResult]:
    best = tta_ext.BestOfN(model, letters, tokenizer, n=8, soft=0.1, batch_size=4)
    beam = tta_ext.ChunkBeamSearch(model, words, tokenizer, beams=2, chunk=8)
    args = tta_ext.RewardGuidedSearch(model, lambda p, r: [1] * len(r), candidates=5)
    tta_ext.BestOfN(model, letters, iterations=3)  # type: ignore[call-arg]
    tta_ext.ChunkBeamSearch(model, letters, n=3)  # type: ignore[call-arg]
    tta_ext.RewardGuidedSearch(model, letters, soft=0.1)  # type: ignore[call-arg]
    best.generate("a", beams=2)  # type: ignore[call-arg]
    beam.generate("a", group=2)  # type: ignore[call-arg]
    args.generate("a", sigma=0.5)  # type: ignore[call-arg]
    return [
        best.generate("a", seed=0, group=2),
        beam.generate("a", restarts=2),
        args.generate("a", weight=1.0, progress=print),
    ]


def operators(logits: torch.Tensor) -> torch.Tensor:
    tta_ext.ops.deferral_sample(logits, logits, prm=0.4)  # type: ignore[call-arg]
    tta_ext.demo_pair(seeds=0)  # type: ignore[call-arg]
    return tta_ext.ops.deferral_sample(logits, logits, rule="nudging", param=0.3, seed=0).token

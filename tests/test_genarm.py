"""GenARM (arXiv:2410.08193): ``implicit_reward`` with an expert trained as a reward model.

An autoregressive reward model has log pi_r(y | x) for a reward, trained on preferences between
whole answers; decoding from ``p(v) pi_r(v)^beta`` needs no more than this rule.
"""

from __future__ import annotations

from typing import Any

import torch
from models import base_model, make_model, make_tokenizer
from searches import PROMPTS

from tta_ext.decoding import KnapsackDeferral

NEW = 6


def early(texts: list[str]) -> list[float]:
    """Share of characters before the P in ASCII: about half of them."""
    return [sum(c < "P" for c in text) / max(len(text), 1) for text in texts]


def trained_reward_model(base: Any, tokenizer: Any) -> Any:
    """``-log sigmoid(log pi_r(better) - log pi_r(worse))`` over pairs of the base's answers."""
    drawn = KnapsackDeferral(base, base, tokenizer, rule="threshold", param=0.0).generate(
        PROMPTS, num_return_sequences=64, max_new_tokens=NEW, eos_token_id=[], seed=5
    )
    assert drawn.texts is not None
    rewards = torch.tensor(early(drawn.texts))
    ids = [p + t for p, t in zip(drawn.prompt_tokens, drawn.tokens, strict=True)]
    expert = make_model(seed=7)
    optimizer = torch.optim.Adam(expert.parameters(), lr=3e-3)
    for step in range(120):
        # One prompt's answers a step, every one against the next.
        rows = slice(64 * (step % len(PROMPTS)), 64 * (step % len(PROMPTS)) + 64)
        batch = torch.tensor(ids[rows])
        log_q = expert(input_ids=batch).logits[:, -NEW - 1 : -1].log_softmax(-1)
        score = log_q.gather(-1, batch[:, -NEW:, None]).sum((1, 2))
        better = (rewards[rows] - rewards[rows].roll(1)).sign()
        loss = -torch.nn.functional.logsigmoid(better * (score - score.roll(1)))
        optimizer.zero_grad()
        loss[better != 0].mean().backward()
        optimizer.step()
    return expert


def test_a_reward_trained_expert_raises_the_reward() -> None:
    base, tokenizer = base_model(), make_tokenizer()
    expert = trained_reward_model(base, tokenizer)
    kad = KnapsackDeferral(base, expert, tokenizer, rule="implicit_reward", param=1.0)
    means = []
    for beta in (0.0, 0.5, 1.0):
        found = kad.generate(
            PROMPTS, param=beta, num_return_sequences=64, max_new_tokens=NEW, eos_token_id=[],
            seed=6,
        )  # fmt: skip
        assert found.texts is not None
        rewards = early(found.texts)
        means.append(sum(rewards) / len(rewards))
    assert means[0] + 0.02 < means[1] < means[2]

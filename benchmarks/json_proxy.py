"""The proxy of :mod:`benchmarks.json_answers`: two layers of its base, tuned to a shape of answers.

First and last layer stand under the base's own embedding, which stays as it is, so that the part
that is learned has a few million weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tta_ext.decoding.runtime.prompts import encode_prompts
from tta_ext.journal import model_facts, resume_key

from . import json_facts
from .acceptance import without_layers

STEPS, BATCH, RATE = 80, 16, 1e-3


def batches(
    tokenizer: Any, training: Sequence[json_facts.Fact], seed: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets), int64 ``[size, columns]`` each; -1 where nothing is to be learned."""
    words = [
        word for word in map(tokenizer.decode, range(len(tokenizer))) if word.strip().isalpha()
    ]
    made = json_facts.documents(training, words, seed)
    while True:
        ids, targets = [], []
        for asked, answer in islice(made, size):
            (before,) = encode_prompts([asked], tokenizer)
            after = tokenizer(answer, add_special_tokens=False)["input_ids"]
            after.append(tokenizer.eos_token_id)
            ids.append(torch.tensor(before + after))
            targets.append(torch.tensor([-1] * (len(before) - 1) + after + [-1]))
        # What pads an answer is not looked at: it stands behind.
        pad = nn.utils.rnn.pad_sequence
        yield pad(ids, batch_first=True), pad(targets, batch_first=True, padding_value=-1)


def train(proxy: Any, data: Iterator[tuple[Tensor, Tensor]], steps: int) -> float:
    """Tune all but the embedding; returns the mean loss of the last tenth, in nats."""
    embedding = proxy.get_input_embeddings().weight.requires_grad_(False)
    learned = [weight for weight in proxy.parameters() if weight is not embedding]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    losses = []
    for ids, targets in islice(data, steps):
        hidden = proxy.model(ids, use_cache=False).last_hidden_state
        asked = targets >= 0
        loss = nn.functional.cross_entropy(hidden[asked] @ embedding.T, targets[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) % 10 == 0:
            print(f"proxy: step {len(losses)} of {steps}, loss {losses[-1]:.3f}", flush=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def folder(
    work: Path, base: Any, tokenizer: Any, training: Sequence[json_facts.Fact], seed: int
) -> Path:
    """The tuned proxy, made on the first call."""
    how = {
        "base": model_facts(base), "facts": json_facts.FACTS, "system": json_facts.SYSTEM,
        "steps": STEPS, "batch": BATCH, "rate": RATE, "seed": seed,
    }  # fmt: skip
    target = work / f"proxy-{resume_key(**how)}"
    if not target.is_dir():
        torch.manual_seed(seed)
        proxy = without_layers(base, range(1, base.config.num_hidden_layers - 1))
        train(proxy.train(), batches(tokenizer, training, seed, BATCH), STEPS)
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            proxy.save_pretrained(Path(scratch) / "proxy")
            (Path(scratch) / "proxy").rename(target)
    return target

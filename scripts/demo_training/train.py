"""Train the demo pair: ``python -m scripts.demo_training.train --out DIR``.

Run it in the checkout's root. It writes four things into DIR, each directory loadable with
``from_pretrained``:

* ``base/``: a small Llama that has read only raw text (1.3M parameters);
* ``proxy_init/``: a smaller one after a short reading of the same text (0.4M parameters);
* ``proxy/``: ``proxy_init`` fine-tuned on documents in the answer format;
* ``training.json``: the settings, token counts, losses and times of the run.

The tokenizer (byte-level BPE, digits split) is trained on the same text and saved beside each
model. Everything is a function of the seeds below. The same machine, thread count and torch version
give the same files; other ones round differently and give models of the same quality.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tta_ext.demo.task import evaluation_problems

from .corpus import formatted_documents, raw_documents

SEED = 20251101
VOCABULARY = 512
EOS, PAD = "<eos>", "<pad>"
ROW = 160  # tokens in a packed row
ROWS = 8  # rows in a step


@dataclass(frozen=True)
class Shape:
    """Sizes of one Llama."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


@dataclass(frozen=True)
class Stage:
    """One training run: which text, how many steps, which peak learning rate."""

    name: str
    text: str  # a phase of the raw text, or "formatted"
    steps: int
    rate: float
    documents: int | None = None  # at most this many documents, then again from the first
    results: float = 1.0  # weight in the loss of the digits after an equals sign


BASE = Shape(hidden=160, layers=4, heads=5, feed_forward=432)
PROXY = Shape(hidden=96, layers=3, heads=3, feed_forward=256)
BASE_STAGES = (
    Stage("base/knowledge", "knowledge", 1000, 2e-3, results=5.0),
    Stage("base/final", "final", 2200, 2e-3, results=5.0),
)
READING_STAGES = (Stage("base/reading", "reading", 1400, 1.5e-3),)
PROXY_STAGES = (Stage("proxy/final", "final", 900, 3e-3),)
FORMAT_STAGES = (Stage("proxy/format", "formatted", 250, 2e-3, documents=2000),)


def train_tokenizer(documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of :data:`VOCABULARY` entries on raw and formatted text, digits split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw = (text for text, _ in islice(raw_documents(SEED, "final"), documents))
    formatted = (text for text, _ in islice(formatted_documents(SEED), documents // 5))
    tokenizer.train_from_iterator([*raw, *formatted], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh float32 model with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def texts_of(stage: Stage, seed: int) -> Iterator[str]:
    """The stage's documents, without end."""
    if stage.text == "formatted":
        stream: Iterator[str] = (text for text, _ in formatted_documents(seed))
    else:
        stream = (text for text, _ in raw_documents(seed, stage.text))
    if stage.documents is None:
        yield from stream
        return
    kept = list(islice(stream, stage.documents))
    while True:
        yield from kept


def packed_rows(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, open_rows: int = 16
) -> Iterator[list[int]]:
    """Rows of at most :data:`ROW` tokens, each of whole documents that end in ``<eos>``.

    A document goes into the first of ``open_rows`` open rows that has room; where none has, the
    fullest row is given out. So a row always starts with a document, as a prompt does.
    """
    rows: list[list[int]] = []
    while True:
        batch = list(islice(texts, 256))
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            ids = [*ids[: ROW - 1], tokenizer.eos_token_id]
            room = next((row for row in rows if len(row) + len(ids) <= ROW), None)
            if room is None:
                if len(rows) == open_rows:
                    fullest = max(range(open_rows), key=lambda i: len(rows[i]))
                    yield rows.pop(fullest)
                rows.append(list(ids))
            else:
                room.extend(ids)


def digits_known(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 200
) -> float:
    """Share of held-out problems whose results are all the argmax, given the right text before."""
    equals = tokenizer.convert_tokens_to_ids("=")
    digits = {tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    known = 0
    for problem in evaluation_problems(n, seed=1):
        start = len(tokenizer(problem.prompt)["input_ids"])
        text = problem.prompt + problem.formatted_answer()
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            guess = model(input_ids=ids).logits[0].argmax(-1)
        right, inside = True, False
        for at in range(start, ids.shape[1]):
            token = int(ids[0, at])
            is_digit = token in digits
            if inside and is_digit:
                right &= int(guess[at - 1]) == token
            inside = token == equals or (inside and is_digit)
        known += right
    return known / n


def run_stages(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stages: tuple[Stage, ...],
    *,
    seed: int,
    log_every: int = 500,
) -> list[dict[str, Any]]:
    """Train through the stages with one optimiser: warm-up, constant rate, decay to nothing."""
    total = sum(stage.steps for stage in stages)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    done, records = 0, []
    pad, equals = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("=")
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))

    def results(ids: torch.Tensor) -> torch.Tensor:
        """Which tokens but the first are the first or second digit after an equals sign."""
        digit, after = torch.isin(ids, digits), ids == equals
        first = digit[:, 1:] & after[:, :-1]
        first[:, 1:] |= digit[:, 2:] & first[:, :-1]
        return first

    for stage in stages:
        texts = _Counted(texts_of(stage, seed))
        rows = packed_rows(texts, tokenizer)
        started, tokens, losses = time.perf_counter(), 0, []
        cpu_started = time.process_time()
        model.train()
        for step in range(1, stage.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * _rate_scale(done, total)
            batch = [next(rows) for _ in range(ROWS)]
            ids = torch.full((ROWS, ROW), pad)
            for i, row in enumerate(batch):
                ids[i, : len(row)] = torch.tensor(row)
            # Padding stands at the right, so the causal mask alone hides it.
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], ignore_index=pad, reduction="none"
            )
            weight = torch.where(results(ids), stage.results, 1.0) * (ids[:, 1:] != pad)
            loss = (each * weight).sum() / weight.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(map(len, batch))
            losses.append(loss.item())
            done += 1
            if step % log_every == 0 or step == stage.steps:
                model.eval()
                print(
                    f"{stage.name} {step}/{stage.steps} loss {_mean(losses[-log_every:]):.4f} "
                    f"digits known {digits_known(model, tokenizer, 60):.3f} "
                    f"{time.perf_counter() - started:.0f} s",
                    flush=True,
                )
                model.train()
        records.append(
            asdict(stage)
            | {
                "seed": seed,
                "read": texts.count,
                "tokens": tokens,
                "loss": _mean(losses[-log_every:]),
                "seconds": round(time.perf_counter() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu_started, 1),
            }
        )
    model.eval()
    return records


class _Counted(Iterator[str]):
    """Counts what is taken from an iterator."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts, self.count = texts, 0

    def __next__(self) -> str:
        self.count += 1
        return next(self.texts)


def _rate_scale(done: int, total: int) -> float:
    """Rises over 100 steps (a tenth of a short run), stays at 1, falls over the last third."""
    return min(1.0, (done + 1) / min(100, 1 + total // 10), 3 * (total - done) / total)


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write config, float16 weights and tokenizer.

    The config says float32, so that ``from_pretrained`` widens the weights: small models are
    fastest so on CPUs, and the sums of a batch depend less on its shape.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    file = directory / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)
    tokenizer.save_pretrained(directory)


def train_pair(out: Path, *, scale: float = 1.0, only: str = "") -> None:
    """Train and save the pair; ``scale`` shortens every stage for a trial run.

    Raises:
        ValueError: if ``scale`` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")

    def scaled(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        return tuple(replace(s, steps=max(1, int(s.steps * scale))) for s in stages)

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    records = []
    if only in ("", "proxy"):
        model = make_model(PROXY, tokenizer, SEED + 1)
        records += run_stages(model, tokenizer, scaled(PROXY_STAGES), seed=SEED)
        save(model, tokenizer, out / "proxy_init")
        # Go on from the file, so that proxy_init is what the proxy was before alignment to the bit.
        model = LlamaForCausalLM.from_pretrained(out / "proxy_init", dtype=torch.float32)
        records += run_stages(model, tokenizer, scaled(FORMAT_STAGES), seed=SEED)
        save(model, tokenizer, out / "proxy")
    if only in ("", "base"):
        model = make_model(BASE, tokenizer, SEED)
        records += run_stages(model, tokenizer, scaled(BASE_STAGES), seed=SEED)
        save(model, tokenizer, out / "base")
        # Each step is known by now, and the rate has fallen to nothing; from here on all tokens
        # count alike, and with a rate that rises again it learns to keep its place in the story.
        model = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        records += run_stages(model, tokenizer, scaled(READING_STAGES), seed=SEED)
        save(model, tokenizer, out / "base")
    file = out / "training.json"
    if only and file.is_file():
        # The other model's stages stand.
        made = {record["name"] for record in records}
        before = json.loads(file.read_text())["stages"]
        records += [record for record in before if record["name"] not in made]
    summary = {
        "shapes": {"base": asdict(BASE), "proxy": asdict(PROXY)},
        "vocabulary": VOCABULARY,
        "row": ROW,
        "rows": ROWS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stages": sorted(records, key=lambda record: record["name"]),
    }
    file.write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description="Train the demo pair of tta_ext.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; 1 made the shipped files"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="shorten every stage for a trial")
    parser.add_argument("--only", choices=("", "base", "proxy"), default="", help="train one model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train_pair(arguments.out, scale=arguments.scale, only=arguments.only)


if __name__ == "__main__":
    main()

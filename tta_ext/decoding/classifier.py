"""A sequence-classification model of transformers as a reward."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tta_ext.decoding.runtime.compat import accepts
from tta_ext.decoding.runtime.loading import LoadingOptions, load_classifier, load_tokenizer
from tta_ext.decoding.runtime.models import class_name, device_of
from tta_ext.decoding.runtime.prompts import render

__all__ = ["ClassifierReward", "input_limit", "prompt_text"]


def prompt_text(prompt: Any) -> str:
    """A prompt as plain text: a conversation's messages on lines of their own.

    Raises:
        ValueError: the prompt is token ids.
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in _messages(prompt))


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as a conversation."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt and all(isinstance(message, Mapping) for message in prompt):
        return [dict(message) for message in prompt]
    raise ValueError("the prompt is token ids, and this reward reads text")


class ClassifierReward:
    """A transformers sequence-classification model as reward.

    Prompt and answer are put into the reward model's own chat template as a conversation. Without a
    template they are encoded as a pair of texts. Scores are those that the model gives each input
    alone: inputs of different length share a forward, but their padding is no part of it.

    Args:
        model: ``AutoModelForSequenceClassification``.
        tokenizer: its tokenizer.
        label: which output is the reward, by number or by its name in the model's configuration;
            may be left out if there is one only.
        probability: take the label's log-probability in place of its logit.
        template: a chat template in place of the tokenizer's.
        single: the answer alone is scored, without its prompt and any template.
        batch_size: answers in a forward at most.
        max_length: longer inputs lose the beginning of their prompt, and of the answer where that
            is not enough; tokens that mark borders stay. None takes the model's number of
            positions, or the tokenizer's limit if that is less.

    Raises:
        ValueError: no such label, or several outputs and no label.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        label: int | str | None = None,
        probability: bool = False,
        template: str | None = None,
        single: bool = False,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if single and template is not None:
            raise ValueError("template is given, and single scores answers without one")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.probability, self.template, self.single = probability, template, single
        self.batch_size, self.label = batch_size, self._find(label, model.config)
        self.max_length = input_limit(model, tokenizer) if max_length is None else max_length
        # Cuts from the left; the caller's tokenizer stays as it is.
        self._cutter = copy.deepcopy(tokenizer)
        self._cutter.truncation_side = "left"
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({class_name(self.model)}, label={self.label})"

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> ClassifierReward:
        """Load a reward model (safetensors) and its tokenizer.

        Args:
            path, dtype, device: as :func:`~tta_ext.decoding.runtime.loading.load_model`.
            options: its :class:`~tta_ext.decoding.runtime.loading.LoadingOptions`; the rest as the
                constructor's.
        """
        loading: Any = {k: options.pop(k) for k in LoadingOptions.__annotations__ if k in options}
        model = load_classifier(path, dtype=dtype, device=device, **loading)
        return cls(model, load_tokenizer(path, **loading), **options)

    @staticmethod
    def _find(label: int | str | None, config: Any) -> int:
        count = int(config.num_labels)
        names = {str(name): int(i) for i, name in (config.id2label or {}).items()}
        if label is None:
            if count == 1:
                return 0
            raise ValueError(
                f"the reward model has {count} outputs; choose one: {', '.join(names)}"
            )
        index = names.get(label, -1) if isinstance(label, str) else label
        if isinstance(label, bool) or not 0 <= index < count:
            raise ValueError(
                f"label is {label!r}, expected one of {', '.join(names)} or 0 to {count - 1}"
            )
        return index

    def encode(self, prompt: Any, response: str) -> list[int]:
        """Token ids of one prompt and answer."""
        return self.features(prompt, response)["input_ids"]

    def features(self, prompt: Any, response: str) -> dict[str, list[int]]:
        """What the model reads of one prompt and answer: ids, and token types where it has them."""
        template = self.template or getattr(self.tokenizer, "chat_template", None)
        if template and not self.single:
            messages = [*_messages(prompt), {"role": "assistant", "content": response}]
            found = render(
                self.tokenizer, messages, template, add_generation_prompt=False,
                named=("an answer", "the reward model"),
            )  # fmt: skip
            if self.max_length:
                found = {name: list(row)[-self.max_length :] for name, row in found.items()}
        else:
            texts = [response] if self.single else [prompt_text(prompt), response]
            found = self.tokenizer(*texts)
            over = len(found["input_ids"]) - (self.max_length or len(found["input_ids"]))
            if over > 0:
                first = self.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
                found = self._cutter(
                    *texts,
                    max_length=self.max_length,
                    truncation="only_first" if over < len(first) else "longest_first",
                )
        return {
            name: list(row)
            for name, row in found.items()
            if name == "input_ids" or (name == "token_type_ids" and accepts(self.model, name))
        }

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        encoded = [self.features(p, r) for p, r in zip(prompts, responses, strict=True)]
        rewards = [0.0] * len(encoded)
        # Neighbours in length share a batch, so little is padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            logits = self._logits([encoded[i] for i in part])
            if self.probability:
                logits = (
                    torch.nn.functional.logsigmoid(logits)
                    if logits.shape[-1] == 1
                    else torch.log_softmax(logits, dim=-1)
                )
            for i, value in zip(part, logits[:, self.label].tolist(), strict=True):
                rewards[i] = value
        return rewards

    def _logits(self, rows: Sequence[Mapping[str, list[int]]]) -> Tensor:
        """The model's outputs ``[rows, labels]`` in float32."""
        config, device = self.model.config, device_of(self.model)
        text = config.get_text_config()
        own = next((p for p in (config.pad_token_id, text.pad_token_id) if p is not None), None)
        # Decoder-like classifiers score the last token that is no padding; without a padding id
        # that is the last one. So padding must then be an id that no input has.
        used = {i for row in rows for i in row["input_ids"]}
        pad = min(set(range(len(used) + 1)) - used) if own is None else int(own)
        names = rows[0].keys()
        batch = {
            name: _padded([row[name] for row in rows], pad if name == "input_ids" else 0)
            for name in names
        }
        batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        batch = {name: block.to(device) for name, block in batch.items()}
        with self._lock:
            if own is None:
                config.pad_token_id = text.pad_token_id = pad
            try:
                return self.model(**batch).logits.float()
            finally:
                if own is None:
                    config.pad_token_id = text.pad_token_id = None


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    blocks = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(blocks, batch_first=True, padding_value=value)


def input_limit(model: Any, tokenizer: Any) -> int | None:
    """Tokens that a model has positions for, and its tokenizer says it may have.

    Models whose positions start behind the padding id (RoBERTa) have fewer than their table has
    rows; those whose positions are relative alone (DeBERTa) have no limit.
    """
    limits: list[Any] = []
    tables = [
        part
        for name, part in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding)
    ]
    for table in tables:
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        limits.append(table.num_embeddings - first)
    config = model.config.get_text_config()
    if not tables and not getattr(config, "relative_attention", False):
        limits.append(getattr(config, "max_position_embeddings", None))
    limits.append(getattr(tokenizer, "model_max_length", None))
    # Tokenizers without a limit say 10^30.
    return min((int(limit) for limit in limits if limit and limit < 10**9), default=None)

"""Closeness of sentence embeddings as a reward, or as a measure beside one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.classifier import input_limit, prompt_text
from tta_ext.decoding.runtime.loading import LoadingOptions, load_encoder, load_tokenizer
from tta_ext.decoding.runtime.models import class_name, device_of

__all__ = ["EmbeddingReward"]


class EmbeddingReward:
    """Cosine, -1 to 1, of the embeddings of an answer and of a wanted text, or of its prompt.

    An embedding is the mean of an encoder's last hidden states over a text's tokens, as
    sentence-transformers' encoders with mean pooling are trained for. Closeness to the prompt is
    what the literature on decoding calls coherence.

    Args:
        model: an encoder of transformers (``AutoModel``).
        tokenizer: its tokenizer.
        wanted: the text to be close to; None: each answer's prompt.
        batch_size: texts in a forward at most.

    Source: Reimers and Gurevych, "Sentence-BERT", arXiv:1908.10084; coherence as in Su et al.,
    arXiv:2202.06417.
    """

    def __init__(
        self, model: Any, tokenizer: Any, wanted: str | None = None, *, batch_size: int = 64
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if wanted is not None and not wanted.strip():
            raise ValueError("wanted is empty, expected a text, or None for the prompt")
        self.model, self.tokenizer, self.wanted = model.eval(), tokenizer, wanted
        self.batch_size, self.max_length = batch_size, input_limit(model, tokenizer)

    def __repr__(self) -> str:
        what = "the prompt" if self.wanted is None else repr(self.wanted)
        return f"{type(self).__name__}({class_name(self.model)}, closeness to {what})"

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        wanted: str | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> EmbeddingReward:
        """Load an encoder (safetensors) and its tokenizer.

        Args:
            path, dtype, device: as :func:`~tta_ext.decoding.runtime.loading.load_model`.
            wanted: as the constructor's.
            options: its :class:`~tta_ext.decoding.runtime.loading.LoadingOptions`; the rest as the
                constructor's.
        """
        loading: Any = {k: options.pop(k) for k in LoadingOptions.__annotations__ if k in options}
        model = load_encoder(path, dtype=dtype, device=device, **loading)
        return cls(model, load_tokenizer(path, **loading), wanted, **options)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, float32 ``[len(texts), d]`` on the CPU.

        That of an empty text is 0. Texts beyond the encoder's limit lose their end.
        """
        size = self.model.config.get_text_config().hidden_size
        rows = {"": torch.zeros(size)}  # no token, no direction
        # Each once. Neighbours in length share a batch, so little is padding.
        order = sorted({text for text in texts if text}, key=lambda text: (len(text), text))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            read = self.tokenizer(
                part, padding=True, truncation=self.max_length is not None,
                max_length=self.max_length, return_tensors="pt",
            ).to(device_of(self.model))  # fmt: skip
            hidden = self.model(**read).last_hidden_state.float()
            total = hidden.masked_fill(read["attention_mask"].unsqueeze(-1) == 0, 0.0).sum(1)
            # Of length 1, the sum points where the mean does.
            rows |= zip(part, torch.nn.functional.normalize(total, dim=-1).cpu(), strict=True)
        return torch.stack([rows[text] for text in texts]) if texts else torch.empty(0, size)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        others = [self.wanted or prompt_text(prompt) for prompt in prompts]
        both = self.embed([*responses, *others])
        cosines: list[float] = (both[: len(others)] * both[len(others) :]).sum(-1).tolist()
        return cosines

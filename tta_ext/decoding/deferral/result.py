"""What a decoding run returns: tokens, text, sources, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.deferral.trace import TokenTrace
from tta_ext.decoding.runtime.prompts import text_of
from tta_ext.decoding.runtime.rows import picked_rows
from tta_ext.frames import to_pandas

__all__ = ["DecodeStats", "Generation"]


@dataclass
class DecodeStats:
    """Counters and wall-clock of a run; ``+`` adds two runs.

    Attributes:
        tokens: tokens generated.
        deferred_tokens: how many of them came from the proxy.
        steps: steps of the loop.
        base_calls, base_tokens: forwards of the base, and tokens fed to it (padding not counted).
        proxy_calls, proxy_rows, proxy_tokens: the same for the proxy, with the rows of all its
            forwards.
        proxy_calls_saved: steps at which no row needed the proxy.
        proxy_rows_saved: tokens for which the proxy was not asked.
        base_seconds, proxy_seconds: time inside the models' forwards, cache updates included. On
            CUDA these are times of submission unless the models wait for the device.
        seconds: time of the whole loop.
        row_steps: steps of all rows; plain decoding adds a token in each.
        draft_tokens: tokens that were drafted (speculative decoding).
        judged_tokens: how many of them were looked at: those before a row's first difference from
            the plain loop, and that one.
        accepted_tokens: how many of those stood.
        accepted_lengths: how often a draft had 0, 1, 2, ... tokens accepted.
        speculation: what speculative decoding has to say, such as why drafts pause.
        runners: how each model ran, by its name: ``"ragged"`` or ``"lockstep"``.
    """

    tokens: int = 0
    deferred_tokens: int = 0
    steps: int = 0
    base_calls: int = 0
    base_tokens: int = 0
    proxy_calls: int = 0
    proxy_rows: int = 0
    proxy_tokens: int = 0
    proxy_calls_saved: int = 0
    proxy_rows_saved: int = 0
    base_seconds: float = 0.0
    proxy_seconds: float = 0.0
    seconds: float = 0.0
    row_steps: int = 0
    draft_tokens: int = 0
    judged_tokens: int = 0
    accepted_tokens: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    speculation: str = ""
    runners: dict[str, str] = field(default_factory=dict)

    @property
    def other_seconds(self) -> float:
        """Time outside the models' forwards: ops, bookkeeping, masks."""
        return self.seconds - self.base_seconds - self.proxy_seconds

    @property
    def other_share(self) -> float:
        """``other_seconds`` as a share of the loop's time."""
        return self.other_seconds / self.seconds if self.seconds else 0.0

    @property
    def deferral_rate(self) -> float:
        """Share of tokens that came from the proxy."""
        return self.deferred_tokens / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the loop."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the judged draft tokens that stood."""
        return self.accepted_tokens / self.judged_tokens if self.judged_tokens else 0.0

    @property
    def tokens_per_base_forward(self) -> float:
        """Tokens that a row gains by one forward of the base; 1 in plain decoding."""
        return self.tokens / self.row_steps if self.row_steps else 0.0

    def __add__(self, other: DecodeStats) -> DecodeStats:
        total = DecodeStats()
        for one in fields(DecodeStats):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, list):
                value: Any = [x + y for x, y in zip_longest(mine, theirs, fillvalue=0)]
            elif isinstance(mine, dict):
                value = mine | theirs
            elif isinstance(mine, str):
                value = mine or theirs
            else:
                value = mine + theirs
            setattr(total, one.name, value)
        return total

    def as_dict(self) -> dict[str, Any]:
        """All counters and the derived figures, for JSON."""
        derived = (
            "other_seconds",
            "other_share",
            "deferral_rate",
            "tokens_per_second",
            "acceptance_rate",
            "tokens_per_base_forward",
        )
        names = [f.name for f in fields(DecodeStats)] + list(derived)
        return {name: getattr(self, name) for name in names}


@dataclass(repr=False)
class Generation:
    """The answers of one call, in the order of the prompts (``num_return_sequences`` of each).

    Attributes:
        tokens: ids of each answer, with the end-of-sequence id if one was drawn.
        deferred: for each token, whether it came from the proxy.
        finish: why each answer ended: ``"eos"``, ``"stop"`` (stop string or criterion),
            ``"length"``, or ``"error"`` if the call let errors end their answer alone.
        prompt_tokens: ids of each answer's prompt as the base read it.
        texts: answers as text without special tokens, cut before a stop string; None without a
            tokenizer.
        sequence: sequence id of each answer; with ``seed`` it reproduces the answer in any batch.
        seed: the seed of the run.
        trace: one :class:`TokenTrace` a token if a trace was asked for.
        stats: counters and times.
        errors: what was wrong with answers that ended with ``"error"``, by their number.

    An index or a slice, and iteration, give generations of some of the answers, with the counters
    of the whole call.
    """

    tokens: list[list[int]]
    deferred: list[list[bool]]
    finish: list[str]
    prompt_tokens: list[list[int]]
    texts: list[str] | None
    sequence: list[int]
    seed: int
    trace: list[list[TokenTrace]] | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    errors: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice) -> Generation:
        chosen, picked = picked_rows(self, index)
        errors = {i: self.errors[row] for i, row in enumerate(chosen) if row in self.errors}
        return replace(self, **picked, errors=errors)

    def __repr__(self) -> str:
        first = self.texts[0] if self.texts else self.tokens[0] if self.tokens else ""
        return (
            f"<{type(self).__name__}: {len(self)} answers, {sum(map(len, self.tokens))} tokens, "
            f"seed {self.seed}; first {shorten(repr(first), 80, placeholder=' ...')}>"
        )

    @property
    def text(self) -> str:
        """The only answer's text; ``ValueError`` if there are several answers or no tokenizer."""
        if self.texts is None or len(self.texts) != 1:
            count = "no text" if self.texts is None else f"{len(self.texts)} answers"
            raise ValueError(f"the generation has {count}; use .texts or .tokens")
        return self.texts[0]

    def sequences(self, pad_token_id: int = 0) -> Tensor:
        """Prompt and answer of each row, as transformers' ``generate`` lays them out.

        Args:
            pad_token_id: id that fills what is no token.

        Returns:
            int64 ``[rows, longest prompt + longest answer]``: prompts end in one column (padding on
            the left), answers are padded on the right.
        """
        left = max(map(len, self.prompt_tokens), default=0)
        right = max(map(len, self.tokens), default=0)
        out = torch.full((len(self), left + right), pad_token_id, dtype=torch.int64)
        for row, (prompt, answer) in enumerate(zip(self.prompt_tokens, self.tokens, strict=True)):
            out[row, left - len(prompt) : left + len(answer)] = torch.tensor(prompt + answer)
        return out

    def source_spans(self, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        """An answer as pieces of text, each with whether the proxy wrote it; for colouring.

        Borders lie where the text allows: bytes of one character stay together.

        Args:
            row: number of the answer.
            tokenizer: makes text of its ids.
        """
        return source_spans(self.tokens[row], self.deferred[row], tokenizer)

    def to_pandas(self, of: str = "answers") -> Any:
        """A ``pandas.DataFrame``.

        Args:
            of: ``"answers"``, a row for each (``text``, ``tokens`` and ``deferred_tokens`` as
                counts, ``finish``, ``sequence``, ``error``), or ``"tokens"``, a row for each token
                (``answer``, ``place``, ``token``, ``deferred``, and with a trace the fields of
                :class:`TokenTrace`).

        Raises:
            ValueError: another ``of``.
            ImportError: pandas is missing; the message has the command.
        """
        if of == "answers":
            return to_pandas(
                {
                    "text": None if self.texts is None else self.texts[row],
                    "tokens": len(self.tokens[row]),
                    "deferred_tokens": sum(self.deferred[row]),
                    "finish": self.finish[row],
                    "sequence": self.sequence[row],
                    "error": self.errors.get(row),
                }
                for row in range(len(self))
            )
        if of != "tokens":
            raise ValueError(f"of is {of!r}, expected answers or tokens")
        return to_pandas(
            {"answer": row, "place": place, "token": token, "deferred": self.deferred[row][place]}
            | ({} if self.trace is None else self.trace[row][place].as_dict())
            for row, tokens in enumerate(self.tokens)
            for place, token in enumerate(tokens)
        )

    @staticmethod
    def concatenate(parts: Sequence[Generation]) -> Generation:
        """One generation of several with the same seed and options."""
        if not parts:
            raise ValueError("there is nothing to concatenate")
        first = parts[0]
        return Generation(
            tokens=[x for part in parts for x in part.tokens],
            deferred=[x for part in parts for x in part.deferred],
            finish=[x for part in parts for x in part.finish],
            prompt_tokens=[x for part in parts for x in part.prompt_tokens],
            texts=None if first.texts is None else [x for p in parts for x in p.texts or ()],
            sequence=[x for part in parts for x in part.sequence],
            seed=first.seed,
            trace=None if first.trace is None else [x for p in parts for x in p.trace or ()],
            stats=sum((part.stats for part in parts), DecodeStats()),
            errors={row: why for part in parts for row, why in part.errors.items()},
        )


def source_spans(
    tokens: Sequence[int], deferred: Sequence[bool], tokenizer: Any
) -> list[tuple[str, bool]]:
    """Pieces of the decoded text with the source of each; see :meth:`Generation.source_spans`."""
    spans: list[tuple[str, bool]] = []
    written, start = "", 0
    for end, from_proxy in enumerate(deferred, 1):
        piece = text_of(tokenizer, tokens[start:end], special=True)
        if piece.endswith("�") and end < len(tokens):
            continue
        # Decoding from the answer's start keeps the tokenizer's spacing rules in force.
        text = text_of(tokenizer, tokens[:end], special=True)
        spans.append((text[len(written) :], bool(from_proxy)))
        written, start = text, end
    return spans

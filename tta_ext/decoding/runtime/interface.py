"""What the loops ask of a model's runner, whichever way it runs the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from tta_ext.decoding.runtime.models import device_of

__all__ = ["ModelRunner"]


class ModelRunner(ABC):
    """A model and the rows it decodes.

    Attributes:
        kind: ``"ragged"`` or ``"lockstep"``.
        lags: whether rows may hold different numbers of tokens that the model has not been fed.
        count: number of rows.
        device: where the model takes its ids.
        seconds, calls, rows_run, tokens_run: cost of the forwards so far; tokens without padding.
    """

    kind: ClassVar[str]
    lags: ClassVar[bool]
    count: int

    def __init__(self, model: Any, vocabulary: int, masked: Tensor | None, name: str) -> None:
        self.model, self.name = model, name
        self.vocabulary, self.masked = vocabulary, masked
        self.device = device_of(model)
        self.seconds = 0.0
        self.calls = self.rows_run = self.tokens_run = 0
        self._tokens: list[list[int]] = []

    def _load(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Set the rows' tokens; nothing counts as fed."""
        self._tokens = [list(prompt) for prompt in prompts]
        if not all(self._tokens):
            row = self._tokens.index([])
            raise ValueError(f"prompt {row} of {self.name} has no token, expected at least one")
        self.count = len(self._tokens)

    def tokens(self, row: int) -> list[int]:
        """All tokens of a row, prompt first."""
        return self._tokens[row].copy()

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the ids that may be drawn; the others are cut off or -inf."""
        logits = logits[..., : self.vocabulary]
        if self.masked is not None:
            logits = logits.index_fill(-1, self.masked, float("-inf"))
        return logits

    @property
    @abstractmethod
    def total(self) -> Tensor:
        """int64 ``[rows]`` on the model's device, tokens that each row holds; changes in place."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """:attr:`total` on the host; do not write to it."""

    @abstractmethod
    def reload(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Replace the rows' tokens, keeping what is cached of them where that can be done.

        Args:
            prompts: one for each row that the runner was made for.
            room: as for the constructor.
        """

    @abstractmethod
    def append(self, tokens: Sequence[int], newest: Tensor | None = None) -> None:
        """Add one token a row; ``newest`` may give the same int64 ``[rows]`` on the device."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Make row i a copy of what row ``rows[i]`` is now; not more rows than at the start."""

    @abstractmethod
    def adopt(self, source: Any, rows: Sequence[int], room: int) -> None:
        """Take over tokens and state of some rows of another runner, of which all is fed.

        Args:
            source: a runner of the same model and kind.
            rows: which, repeated as needed.
            room: as for the constructor.
        """

    @abstractmethod
    def prefill(self) -> None:
        """Feed the prompts of rows that have been fed nothing, but not a row's last token."""

    @abstractmethod
    def hold(self) -> None:
        """Prefill, and make :meth:`step` feed the last token anew each time until one is added."""

    @abstractmethod
    def step(self) -> Tensor:
        """Feed the one pending token of every row.

        Returns:
            Logits ``[rows, vocabulary]`` in the model's dtype.
        """

    # ---- drafts, which only some lock-step models can take back ----------------------------------

    @abstractmethod
    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Add one token to some rows; in lock-step, to all."""

    @abstractmethod
    def score(self, drafts: Sequence[Sequence[int]]) -> Tensor:
        """Append a draft to every row and feed it with the pending token, all in one forward.

        Args:
            drafts: tokens for each row, perhaps none; in lock-step as many for each.

        Returns:
            Logits ``[rows, 1 + longest draft, vocabulary]``: of row r, columns 0 to
            ``len(drafts[r])`` follow its pending token and each token of its draft; what stands in
            later columns means nothing.
        """

    @abstractmethod
    def settle(self) -> None:
        """Feed all pending tokens but each row's last.

        There are such tokens where a conversation has gone on, or where the lazy proxy lags.
        """

    @abstractmethod
    def rollback(self, kept: Sequence[int], tails: Sequence[Sequence[int]]) -> None:
        """Cut every row to its first ``kept`` tokens and add ``tails`` after them.

        In lock-step all rows gain as many, but those that will leave.
        """

    @abstractmethod
    def scrub(self, row: int) -> None:
        """Forget what tokens that were taken back have left of a row."""

    @abstractmethod
    def catch_up(self, rows: Sequence[int] | None = None, index: Tensor | None = None) -> Tensor:
        """Feed all pending tokens of some rows, which may be many.

        Args:
            rows: which rows, ascending; None for all.
            index: the same as int64 on the model's device, if the caller has it.

        Returns:
            Logits ``[len(rows), vocabulary]`` after each row's last token.
        """

"""How rollouts are drawn: sampling, and Gaussian noise on the pre-logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import TopKLogitsWarper

from tta_ext.decoding.runtime.processors import TopP
from tta_ext.decoding.runtime.rows import Limits
from tta_ext.decoding.runtime.stopping import StopStrings
from tta_ext.decoding.search.ranges import check_choice, check_range

__all__ = ["DECODING", "Noise", "Sampling", "restrict"]

DECODING = ("sample", "greedy")


@dataclass(frozen=True)
class Sampling:
    """How a rollout's tokens come out of its logits, and when it ends.

    Attributes:
        decoding: ``"sample"`` draws each token; ``"greedy"`` takes the most probable one, so that
            rollouts differ by their noise alone.
        temperature: of the draw; > 0.
        top_k: draw from the k most probable tokens (and those tied with the last); None: from all.
        top_p: draw from the smallest set of most probable tokens with at least this mass.
        max_new_tokens: tokens after which a rollout ends.
        ends: ids that end it.
        stop: stop strings that end it.
    """

    decoding: str = "sample"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 64
    ends: frozenset[int] = frozenset()
    stop: StopStrings | None = None

    def __post_init__(self) -> None:
        check_choice(self, "decoding", DECODING)
        Limits(self.max_new_tokens)
        number = isinstance(self.temperature, (int, float))
        if not (number and 0.0 < self.temperature < float("inf")):
            raise ValueError(
                f"temperature is {self.temperature!r}, expected a finite number > 0 "
                "(for the most probable token take decoding='greedy')"
            )
        check_range(self, "at least 1", "top_k")
        check_range(self, "0 < {} <= 1", "top_p")

    @property
    def limits(self) -> Limits:
        """When a rollout ends."""
        return Limits(self.max_new_tokens, self.ends, self.stop)


@dataclass
class Noise:
    """Gaussian noise on pre-logits.

    Attributes:
        mean: u, float32 ``[P, tau, d]``; with ``common``, ``[P, 1 + tau, d]``.
        sigma: standard deviation of each step's own noise.
        common: standard deviation of a second draw that is the same at all of a rollout's steps
            below tau; 0 is none. Row 0 of the mean is then this part's, row 1 + t that of step t,
            and the random streams are numbered like the rows.
    """

    mean: Tensor
    sigma: float
    common: float = 0.0


def restrict(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits with -inf for the tokens that top-k and top-p leave out.

    Args:
        logits: ``[rows, V]``.
        temperature: at which ``top_p`` measures mass.
        top_k, top_p: as in :class:`Sampling`; both may be None. Top-k comes first.
    """
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p is not None:
        logits = TopP(top_p, temperature)(None, logits)
    return logits

"""The one random stream of tta_ext: which Philox counter belongs to which draw.

Every random number is a pure function of a 64-bit seed and of logical indices: position, sequence,
iteration, rollout, what the number is for. Neither the thread, nor the place in a batch, nor the
order of evaluation enters, so a sequence gets the same numbers alone, in any batch, on any device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter
of four 32-bit words and a key of two to four 32-bit words:

======== =====================================================================================
word     content
======== =====================================================================================
``c0``   block of dimensions (``dimension // 4``) for noise, the number of the draw otherwise
``c1``   position of the token (tokens before it, padding not counted), or the step of the noise
``c2``   sequence id, 32 bits, chosen by the caller
``c3``   ``tag << 28 | iteration << 16 | rollout``: 4, 12 and 16 bits
``key``  the seed's low and high 32 bits (a negative seed counts as its two's complement)
======== =====================================================================================

======== === ==========================================================================
tag          used for
======== === ==========================================================================
BASE      0  the token drawn from the base model
PROXY     1  its replacement, drawn from the proxy
SPLIT     2  the critical item, where a fraction of it is deferred
DRAFT     3  draft tokens of speculative decoding
VERIFY    4  acceptance of a draft token
RESIDUAL  5  the token after a rejected draft
BONUS     6  the token after a fully accepted draft
NOISE     7  Gaussian noise on pre-logits
REWARD    8  randomness of a reward or of a selection by reward
USER      9  free for callers
======== === ==========================================================================

A uniform is ``x0 * 2**-32`` with the block's first word ``x0``, exact in float64. Four normals come
from a block by Box-Muller: words (0, 1) give dimensions ``4 c0`` and ``4 c0 + 1``, words (2, 3) the
next two, with ``u = (2 (x >> 9) + 1) 2**-24`` (exact in float32), ``r = sqrt(-2 ln u1)`` and
``(r cos(2 pi u2), r sin(2 pi u2))``.
"""

from __future__ import annotations

import operator
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "BASE",
    "BONUS",
    "DRAFT",
    "NOISE",
    "PROXY",
    "RESIDUAL",
    "REWARD",
    "SPLIT",
    "STREAMS",
    "USER",
    "VERIFY",
    "as_seed",
    "check_iteration",
    "check_rollout",
    "key",
    "resolve_seed",
    "seed_from_generator",
    "stream_word",
]

BASE: Final = 0
PROXY: Final = 1
SPLIT: Final = 2
DRAFT: Final = 3
VERIFY: Final = 4
RESIDUAL: Final = 5
BONUS: Final = 6
NOISE: Final = 7
REWARD: Final = 8
USER: Final = 9

_NAMES = "BASE PROXY SPLIT DRAFT VERIFY RESIDUAL BONUS NOISE REWARD USER".split()
STREAMS: Final[dict[str, int]] = {name: tag for tag, name in enumerate(_NAMES)}

WORD: Final = 1 << 32
ITERATIONS: Final = 1 << 12
ROLLOUTS: Final = 1 << 16


def is_int(value: object) -> bool:
    """Whether something is an integer (also a symbolic one), and no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _refuse_other(name: str, value: object) -> None:
    if not is_int(value):
        raise TypeError(f"{name} is {value!r}, expected an int")


def check_iteration(iteration: int) -> int:
    """The iteration itself; ``ValueError`` unless ``0 <= iteration < 4096``."""
    _refuse_other("iteration", iteration)
    if not 0 <= iteration < ITERATIONS:
        raise ValueError(f"iteration is {iteration}, expected 0 <= iteration < {ITERATIONS}")
    return iteration


def check_rollout(rollout: int) -> int:
    """The rollout itself; ``ValueError`` unless ``0 <= rollout < 65536``."""
    _refuse_other("rollout", rollout)
    if not 0 <= rollout < ROLLOUTS:
        raise ValueError(f"rollout is {rollout}, expected 0 <= rollout < {ROLLOUTS}")
    return rollout


def check_word(name: str, value: int) -> int:
    """The value itself; ``ValueError`` unless it fits 32 bits without a sign."""
    _refuse_other(name, value)
    if not 0 <= value < WORD:
        raise ValueError(f"{name} is {value}, expected 0 <= {name} < 2**32")
    return value


def check_stream(stream: int) -> int:
    """The stream's tag; ``ValueError`` unless it is one of :data:`STREAMS`."""
    _refuse_other("stream", stream)
    if not 0 <= stream <= USER:
        names = ", ".join(f"{name}={tag}" for name, tag in STREAMS.items())
        raise ValueError(f"stream is {stream}, expected one of {names}")
    return stream


def as_seed(seed: int) -> int:
    """The signed 64-bit integer with the seed's bits.

    Args:
        seed: ``-2**63 <= seed < 2**64``. Seeds of 2**63 and more are read as unsigned, so
            ``2**64 - 1`` and ``-1`` are the same seed.

    Raises:
        ValueError: the seed does not fit 64 bits.
    """
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}, expected -2**63 <= seed < 2**64")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def seed_from_generator(generator: torch.Generator) -> int:
    """A seed of 64 random bits drawn from a generator, which advances.

    Two calls on the same generator give two seeds; the same generator state gives the same seed.
    """
    words = torch.randint(
        0, WORD, (2,), generator=generator, device=generator.device, dtype=torch.int64
    ).tolist()
    return as_seed(words[1] << 32 | words[0])


def resolve_seed(seed: int | torch.Generator | None) -> int:
    """The signed 64-bit seed that a caller means.

    Args:
        seed: an integer as for :func:`as_seed`, a generator that supplies one and advances, or None
            for torch's default generator.

    Raises:
        TypeError: something else, such as a fraction.
    """
    if seed is None:
        seed = torch.default_generator
    if isinstance(seed, torch.Generator):
        return seed_from_generator(seed)
    try:
        if isinstance(seed, bool):
            raise TypeError
        return as_seed(operator.index(seed))
    except TypeError:
        raise TypeError(
            f"seed is {seed!r}, expected an integer, a torch.Generator or None"
        ) from None


def key(seed: int) -> tuple[int, int]:
    """The Philox key of a seed: its low and its high 32 bits."""
    bits = as_seed(seed) % (1 << 64)
    return bits % WORD, bits >> 32


def stream_word(stream: int, iteration: int = 0, rollout: int | Tensor = 0) -> int | Tensor:
    """Word ``c3`` of the counter. ``rollout`` may be an int64 tensor, then so is the result."""
    return (stream << 28) | (iteration << 16) | rollout

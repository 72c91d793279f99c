"""Philox4x32-10 and the numbers made from it, in int64 tensor arithmetic: exact on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tta_ext import rng

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * x``, without leaving the range of int64."""
    low_part = (constant & 0xFFFF) * x
    middle = (constant >> 16) * x + (low_part >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """The blocks of the counters ``[..., 4]`` under one key ``[2]``; 32-bit patterns in int64."""
    c0, c1, c2, c3 = (counter & _MASK).unbind(-1)
    k0, k1 = (key.to(counter.device) & _MASK).unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def key_of(seed: Tensor) -> Tensor:
    """The key of a seed: low and high 32 bits of the signed 64-bit integer."""
    seed = seed.reshape(())
    return torch.stack((seed & _MASK, (seed >> 32) & _MASK))


def blocks(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The block of each counter; the words broadcast against each other, on the device of c0."""
    words = torch.broadcast_tensors(c0, *(word.to(c0.device) for word in (c1, c2, c3)))
    return philox(torch.stack(words, dim=-1), key_of(seed))


def box_muller(words: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Four normals from each block ``[..., 4]``."""
    u = (2 * (words >> 9) + 1).to(compute_dtype) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = (2.0 * math.pi) * u[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2)


def noise(
    dimensions: int,
    seed: Tensor,
    step: Tensor,
    sequence: Tensor,
    iteration: int,
    rollout: Tensor,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals ``[..., dimensions]`` for steps, sequences and rollouts of one shape."""
    c0 = torch.arange((dimensions + 3) // 4, dtype=torch.int64, device=step.device)
    c3 = torch.as_tensor(rng.stream_word(rng.NOISE, iteration, rollout), device=step.device)
    words = blocks(
        seed,
        c0.expand(*step.shape, -1),
        step.unsqueeze(-1),
        sequence.unsqueeze(-1),
        c3.unsqueeze(-1),
    )
    return box_muller(words, compute_dtype).flatten(-2)[..., :dimensions]


def normal(
    n: int,
    seed: Tensor,
    step: int,
    sequence: int,
    iteration: int,
    rollout: int,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dimensions 0 to n-1 of the noise at one step of one rollout."""
    indices = torch.tensor([step, sequence, rollout], dtype=torch.int64, device=seed.device)
    return noise(n, seed, indices[0], indices[1], iteration, indices[2], compute_dtype)

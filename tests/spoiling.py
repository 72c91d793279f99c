"""Arguments that are no good: extremes, shapes, strides, types; memory with unreadable ends."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

REALS = (
    np.nan,
    np.inf,
    -np.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-39,
    1e-30,
    0.5,
    1.0,
    -1.0,
    88.8,
    3e38,
    -3e38,
)
NUMBERS = (*REALS, 1e-320, 1e308, 1e-38)
WHOLES = (0, 1, -1, 2, 15, 16, 4095, 4096, 65535, 65536, 2**31, 2**32 - 1, 2**32, 2**62,
          2**63 - 1, -(2**63))  # fmt: skip
OTHERS = (
    None,
    "0.3",
    b"",
    [],
    [1.0],
    {},
    True,
    1.5,
    2**64,
    -(2**64),
    10**400,
    object(),
    np.float64(0.5),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
          torch.bool, torch.complex64, torch.uint8)  # fmt: skip
GUARD = 64
PAGE = mmap.PAGESIZE


class Rng:
    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, values: Any) -> Any:
        return values[self.below(len(values))]


# ---------------------------------------------------------------------------- tensors

_libc = ctypes.CDLL(None, use_errno=True)


def flat(x: Tensor) -> Tensor:
    """All elements from a tensor's first to its last, whatever lies between."""
    if not x.numel():
        return x.new_empty(0)
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.as_strided(x, (span,), (1,))


def at_the_edge(x: Tensor) -> Tensor:
    """The same numbers and strides in memory that ends where nothing can be read."""
    values = flat(x)
    size = values.numel() * values.element_size()
    if not size:
        return x
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    room = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * PAGE - size)
    return torch.as_strided(room.view(x.dtype).copy_(values), x.shape, x.stride())


def guarded(x: Tensor, garbage: int) -> tuple[Tensor, Tensor]:
    """An output over garbage, and the memory around it too."""
    size = x.numel() * x.element_size()
    memory = torch.full((size + 2 * GUARD,), garbage, dtype=torch.uint8)
    return memory[GUARD : GUARD + size].view(x.dtype).view(x.shape), memory


def bits(x: Tensor) -> bytes:
    """What two equal results share; a NaN has no bits of its own."""
    x = x.detach().contiguous()
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    return x.view(-1).view(torch.uint8).numpy().tobytes()


def plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.requires_grad


# ---------------------------------------------------------------------------- spoiling


def extreme(r: Rng, x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    if not x.numel():
        return x
    values = REALS if x.is_floating_point() else WHOLES if x.dtype == torch.int64 else (0, 1)
    places = x.view(-1)
    for _ in range(1 + r.below(3)):
        if r.chance(0.2):
            places[:] = r.one_of(values)
        else:
            places[r.below(x.numel())] = r.one_of(values)
    return x


def reshaped(r: Rng, x: Tensor) -> Tensor:
    kind = r.below(6)
    if kind == 0 and x.dim():
        dim = r.below(x.dim())
        return x.narrow(dim, 0, r.below(x.shape[dim] + 1))
    if kind == 1 and x.dim():
        return x.select(r.below(x.dim()), 0) if min(x.shape) else x.reshape(-1)
    if kind == 2:
        return x.unsqueeze(r.below(x.dim() + 1))
    if kind == 3:
        return torch.cat((x, x), r.below(x.dim())) if x.dim() else x.expand(3)
    if kind == 4:
        one = r.one_of(((), (1,), (2, 1), (1, 1, 1)))
        return x.reshape(-1)[0].expand(one) if x.numel() else x
    return x.new_zeros([r.one_of((0, 1, 2, 5)) for _ in range(r.below(5))])


def strided(r: Rng, x: Tensor) -> Tensor:
    kind = r.below(4)
    if kind == 0 and x.numel():
        return x.reshape(-1)[:1].expand(x.numel()).view(x.shape)
    if kind == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2 and x.dim() > 1:
        return x[:1].expand(x.shape)
    wide = torch.zeros((*x.shape, 2), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def odd(r: Rng, x: Tensor) -> Any:
    kind = r.below(6)
    if kind == 0:
        return x.to("meta")
    if kind == 1 and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    if kind == 2 and x.is_floating_point():
        return torch.nn.Parameter(x)
    if kind == 3:
        return x.to_sparse() if x.dim() else x
    if kind == 4:
        return x.tolist() if x.numel() < 50 else None
    return r.one_of(OTHERS)


def retyped(r: Rng, x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 1.0, -1.0).to(r.one_of(DTYPES))


def spoilt(r: Rng, value: Any, kind: str) -> Any:
    """An argument of a schema's type, changed."""
    if r.chance(0.03):
        return r.one_of(OTHERS)
    if isinstance(value, Tensor):
        if not plain(value):
            return value
        how = r.one_of((extreme, extreme, extreme, reshaped, strided, strided, retyped, odd))
        return how(r, value)
    if kind == "float":
        return r.one_of(NUMBERS)
    if kind in ("int", "SymInt"):
        near = type(value) is int and r.chance(0.3)
        return value + r.one_of((-1, 1, 2)) if near else r.one_of(WHOLES)
    if kind == "bool":
        return not value
    return None


def typed(r: Rng, kind: str) -> Any:
    """Anything of a schema's type."""
    if kind == "Tensor?" and r.chance(0.4):
        return None
    if kind.startswith("Tensor"):
        shape = [r.one_of((0, 1, 2, 3, 7, 130)) for _ in range(r.one_of((0, 1, 2, 2, 3, 4)))]
        return extreme(r, torch.from_numpy(r.rng.normal(size=shape)).to(r.one_of(DTYPES)))
    return {"float": r.one_of(NUMBERS), "bool": r.chance(0.5)}.get(kind, r.one_of(WHOLES))

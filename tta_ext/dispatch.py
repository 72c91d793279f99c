"""Which backend runs an operator: loading of the native library, fallback, forced backends."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tta_ext import schemas
from tta_ext.schemas import OpSpec

__all__ = ["BACKENDS", "Op", "invoke", "native_status", "serves", "use_backend"]

BACKENDS = ("reference", "cpu", "cuda")

_INVALID = "invalid row: "

# The backend forced by use_backend, for the whole process; None lets the dispatcher choose.
_forced: str | None = None

_lock = threading.RLock()
# Of each library: "" = usable, other text = why not, None = not tried yet.
_native: str | None = None
_cuda: str | None = None
# Devices whose loaded library is of another version: its kernels are registered and cannot be taken
# back, so they must be walked around.
_stale: set[str] = set()


class Op:
    """An operator with its overloads looked up once."""

    __slots__ = ("allocate", "functional", "name", "out", "outputs", "results", "run", "spec")

    def __init__(self, name: str) -> None:
        packet = getattr(torch.ops.tta_ext, name)
        self.spec = schemas.OPS[name]
        self.name = name
        self.outputs = self.spec.outputs
        self.results = self.spec.results
        self.allocate = self.spec.allocate
        self.functional = packet.default
        self.out = packet.out
        # The same without torch's Python wrapper, which costs a tenth of a small call.
        self.run: Callable[..., Any] = getattr(packet.out, "_op", packet.out)


def native_status() -> str:
    """Empty if the native CPU library is loaded, otherwise why it is not; loads it if need be."""
    global _native
    if _native is None:
        with _lock:
            if _native is None:
                _native = _load_native()
    return _native


def _load_native() -> str:
    from tta_ext import build

    result = build.load("cpu")
    if not result.loaded:
        return result.reason or "no reason given"
    return _check_version(torch.ops.tta_ext.native_version(), str(result.path), "CPU")


def cuda_status() -> str:
    """Empty if the CUDA library is loaded, otherwise why it is not; loads it if need be."""
    global _cuda
    if _cuda is None:
        with _lock:
            if _cuda is None:
                _cuda = _load_cuda()
    return _cuda


def _load_cuda() -> str:
    from tta_ext import build

    result = build.load("cuda")
    if not result.loaded:
        return result.reason or "no reason given"
    return _check_version(torch.ops.tta_ext.cuda_version(), str(result.path), "CUDA")


def _check_version(version: int, path: str, device: str) -> str:
    """Why a loaded library must not be used; empty if it may."""
    if version == schemas.NATIVE_VERSION:
        return ""
    reason = (
        f"{path} was built for operator version {version}, this is version "
        f"{schemas.NATIVE_VERSION}; reinstall tta_ext to mend it"
    )
    warnings.warn(f"native {device} operators are off: {reason}", stacklevel=3)
    _stale.add(device.lower())
    return reason


def has_kernel(name: str, device: str) -> bool:
    """Whether a compiled kernel of the operator is registered for "cpu" or "cuda"."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"tta_ext::{name}.out", device.upper())
    )


def serves(name: str, device: str = "cpu") -> tuple[str, str]:
    """Which backend runs an operator on a device, and why not a faster one (empty if none is)."""
    if device in ("cpu", "cuda"):
        reason = native_status() if device == "cpu" else cuda_status()
        if reason:
            return "reference", reason
    if has_kernel(name, device):
        return device, ""
    return "reference", f"no compiled {device} kernel of {name} is loaded"


def reference(name: str) -> Callable[..., Any]:
    """The reference function of an operator."""
    module = importlib.import_module("tta_ext.backends.reference")
    return getattr(module, name)


def _into(spec: OpSpec, results: Any, outputs: Sequence[Tensor]) -> None:
    values = results if isinstance(results, tuple) else (results,)
    for name, value, output in zip(spec.outputs, values, outputs, strict=True):
        if name in spec.accumulated:
            output.add_(value)
        else:
            output.copy_(value)


def run_without_kernel(spec: OpSpec, args: Sequence[Any], outputs: dict[str, Tensor]) -> None:
    """``X.out`` where no compiled kernel is registered yet: load one, or run the reference."""
    first = next(iter(outputs.values()))
    untried = (first.is_cpu and _native is None) or (first.is_cuda and _cuda is None)
    if untried and serves(spec.name, first.device.type)[0] != "reference":
        getattr(torch.ops.tta_ext, spec.name).out(*args, **outputs)
        return
    _run_reference(spec, args, [outputs[name] for name in spec.outputs])


schemas.fallback = run_without_kernel


def _run_reference(spec: OpSpec, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        _into(spec, reference(spec.name)(*args), outputs)


def _run_forced(op: Op, args: Sequence[Any], out: Sequence[Tensor]) -> Sequence[Tensor]:
    device = out[0].device.type
    if _forced == "reference" or (_forced is None and device in _stale):
        _run_reference(op.spec, args, out)
        return out
    if _forced is not None and device != _forced:
        raise RuntimeError(
            f"backend {_forced!r} is forced but the tensors are on {out[0].device}; move them to "
            f"{_forced} or leave use_backend"
        )
    if _forced == "cuda" and not has_kernel(op.name, "cuda"):
        raise RuntimeError(
            f"backend {_forced!r} has no kernel of {op.name}; use_backend('reference') has one"
        )
    _call_out(op, args, out)
    return out


def _call_out(op: Op, args: Sequence[Any], out: Sequence[Tensor]) -> None:
    try:
        op.out(*args, **dict(zip(op.outputs, out)))  # noqa: B905
    except RuntimeError as error:
        raise translated(error) from None


def translated(error: RuntimeError) -> Exception:
    """A kernel's complaint about its input as ``ValueError``, anything else as it is."""
    text = str(error)
    start = text.find(_INVALID)
    if start < 0:
        return error
    return ValueError(text[start + len(_INVALID) :].partition("\n")[0])


def invoke(op: Op, args: Sequence[Any], out: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """Run an operator on validated arguments, into ``out`` if it is given."""
    if torch.compiler.is_compiling():
        if out is None:
            result = op.functional(*args)
            return (result,) if len(op.outputs) == 1 else result
        op.out(*args, **dict(zip(op.outputs, out)))  # noqa: B905
        return out
    if out is None:
        out = op.allocate(*args)
    if _forced is not None or _stale:
        return _run_forced(op, args, out)
    names = op.outputs
    try:
        if len(names) == 2:  # decoding steps: spares the zip
            op.run(*args, **{names[0]: out[0], names[1]: out[1]})
        else:
            op.run(*args, **dict(zip(names, out)))  # noqa: B905
    except RuntimeError as error:
        raise translated(error) from None
    return out


def unavailable(backend: str) -> str:
    """Why a backend cannot be forced; empty if it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        return native_status()
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; install a CUDA build of torch on a machine with one"
    return cuda_status()


class use_backend:
    """Make all public operators of this process use one backend, inside a ``with`` block.

    Args:
        backend: ``"reference"`` (plain PyTorch, any device), ``"cpu"`` or ``"cuda"``
            (compiled).

    Raises:
        ValueError: not a backend.
        RuntimeError: the backend cannot run here; the message says why and what would mend it.

    The choice holds for the process, not for the thread, and does not reach into graphs that
    ``torch.compile`` has already made. ``torch.ops.tta_ext.*`` are not affected.

    Example:
        >>> with tta_ext.use_backend("reference"):
        ...     mask = tta_ext.ops.deferral_mask(logits, rule="threshold", param=0.3)
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
        self._backend = backend
        self._outer: str | None = None

    def __enter__(self) -> use_backend:
        global _forced
        reason = unavailable(self._backend)
        if reason:
            raise RuntimeError(f"backend {self._backend!r} is not available: {reason}")
        self._outer, _forced = _forced, self._backend
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._outer

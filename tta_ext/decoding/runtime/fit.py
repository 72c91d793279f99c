"""Which runner a model gets: ragged where its rows may differ in length, lock-step elsewhere."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tta_ext.decoding.runtime.attention import check_model, ragged_refusal
from tta_ext.decoding.runtime.compat import accepts, reset_rotary
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.lockstep import LockstepRunner
from tta_ext.decoding.runtime.models import class_name, device_of
from tta_ext.decoding.runtime.probe import (
    draft_difference,
    lockstep_difference,
    position_reach,
    ragged_difference,
    tolerance,
)
from tta_ext.decoding.runtime.runner import Runner

__all__ = ["RUNNERS", "Fit", "fit_model", "takes_drafts"]

log = logging.getLogger("tta_ext")

RUNNERS: dict[str, type[ModelRunner]] = {"ragged": Runner, "lockstep": LockstepRunner}


@dataclass(frozen=True)
class Fit:
    """How a model is run.

    Attributes:
        kind: ``"ragged"`` or ``"lockstep"``.
        reason: why not ragged; "" if it is.
        reach: rows of more tokens change what shorter ones beside them compute, through rotary
            factors that follow the longest row; None if no row does.
        contiguous: the model's code asks for keys and values without gaps.
        picks: the rows of the model's own cache can be picked.
        pad: id of the padding; None: the model's.
    """

    kind: str
    reason: str = ""
    reach: int | None = None
    contiguous: bool = False
    picks: bool = True
    pad: int | None = None

    def kind_for(self, tokens: int) -> str:
        """The runner for rows that grow to this many tokens."""
        return "lockstep" if self.apart(tokens) else self.kind

    def apart(self, tokens: int) -> bool:
        """Whether rows that grow to this many tokens disturb shorter ones, so they run apart."""
        return self.reach is not None and tokens > self.reach

    def runner(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        vocabulary: int,
        masked: Sequence[int] = (),
        name: str = "model",
        tokens: int | None = None,
        pad: int | None = None,
    ) -> ModelRunner:
        """A runner over prompts.

        Args:
            model: the model.
            prompts: token ids of each row, none empty.
            room: number of tokens that will be appended to a row at most.
            vocabulary: number of leading logits to return.
            masked: ids below ``vocabulary`` that must never be drawn.
            name: name in profiles and messages.
            tokens: how many a row will have at most; None: the longest prompt and ``room``.
            pad: id of the padding, in place of :attr:`pad`.
        """
        if tokens is None:
            tokens = max(map(len, prompts), default=0) + room
        kind = self.kind_for(tokens)
        make: Callable[..., ModelRunner] = RUNNERS[kind]
        extra: dict[str, Any] = {"contiguous": self.contiguous}
        if kind == "lockstep":
            pad = self.pad if pad is None else pad
            extra = {"apart": self.apart(tokens), "anew": not self.picks, "pad": pad}
        if self.reach is not None:
            reset_rotary(model)
        never = torch.tensor(masked, device=device_of(model)) if masked else None
        return make(
            model, prompts, room=room, vocabulary=vocabulary, masked=never, name=name, **extra
        )


@dataclass
class _Trials:
    """What trials of a model have found; None where there was no trial yet."""

    ragged: str | None = None
    lockstep: str | None = None
    reach: int | None = None
    contiguous: bool = False
    picks: bool = True
    depends: bool = False
    drafts: bool | None = None


_trials: weakref.WeakKeyDictionary[Any, _Trials] = weakref.WeakKeyDictionary()


def fit_model(
    model: Any, role: str, runner: str | None = None, probe: bool = True, tokenizer: Any = None
) -> Fit:
    """How a model is to be run.

    Args:
        model: a transformers causal language model.
        role: what messages call it, such as ``"base"``.
        runner: ``"ragged"`` or ``"lockstep"`` forces one; None chooses.
        probe: try it on two short rows; the findings are remembered.
        tokenizer: says what its padding is.

    Raises:
        TypeError: not a causal language model.
        ValueError: no runner can decode the model, or not the one that is asked for.
    """
    if runner is not None and runner not in RUNNERS:
        raise ValueError(f"runner is {runner!r}, expected None or one of {', '.join(RUNNERS)}")
    check_model(model, role)
    title = f"{role} ({class_name(model)})"
    reason = None
    found = _trials.setdefault(getattr(model, "inner", model), _Trials())
    if runner != "lockstep":
        reason = ragged_refusal(model)
        if reason is None and probe:
            reason = _ragged_trial(model, title, found)
        if reason is None:
            return Fit("ragged", "", found.reach, found.contiguous)
        if runner == "ragged":
            raise ValueError(f"{title} {reason}; runner='lockstep' decodes it as generate() does")
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{title} {reason or 'has no generate(), which lock-step asks'}")
    if probe:
        failure = _lockstep_trial(model, title, found)
        if failure:
            raise ValueError(f"{title} {failure}")
    pad = getattr(tokenizer, "pad_token_id", None)
    return Fit("lockstep", reason or "runner='lockstep'", found.reach, picks=found.picks, pad=pad)


def takes_drafts(model: Any) -> bool:
    """Whether a model in lock-step reads several tokens at once and crops its cache behind them."""
    found = _trials.setdefault(getattr(model, "inner", model), _Trials())
    if found.drafts is None:
        try:
            found.drafts = draft_difference(model) <= tolerance(model)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a cache of the model's own, which may raise what it likes
            found.drafts = False
    return found.drafts


def _ragged_trial(model: Any, title: str, found: _Trials) -> str | None:
    if found.ragged is None:
        try:
            try:
                difference = ragged_difference(model)
            except RuntimeError as error:
                # A view of what has gaps.
                found.contiguous = "view size is not compatible" in str(error)
                if not found.contiguous:
                    raise
                difference = ragged_difference(model, contiguous=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            found.ragged = f"cannot share a batch between rows of different length ({_line(error)})"
        else:
            found.ragged = ""
            if not difference <= tolerance(model):
                found.ragged = (
                    "gives other logits when rows of different length share a batch "
                    f"(by {difference:.1%} of the largest)"
                )
            elif (
                _places_images(model) and not _lockstep_trial(model, title, found) and found.depends
            ):
                found.ragged = "reads padded rows otherwise than rows alone, in generate() too"
            found.reach = _reach(model)
    return found.ragged or None


def _places_images(model: Any) -> bool:
    """Whether a model may put images before its text, with masks of its own making."""
    return getattr(model.config, "vision_config", None) is not None


def _lockstep_trial(model: Any, title: str, found: _Trials) -> str:
    if found.lockstep is None:
        try:
            difference, found.picks = lockstep_difference(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            found.lockstep = f"cannot be decoded as generate() does ({_line(error)})"
            return found.lockstep
        found.lockstep = ""
        if accepts(model, "position_ids"):
            found.reach = _reach(model)
        found.depends = not difference <= tolerance(model)
        if found.depends:
            log.warning(
                f"{title} gives other logits when rows of different length share a batch (by "
                f"{difference:.1%} of the largest), in generate() too; prompts of one length, or "
                "batch_size=1, avoid that"
            )
    return found.lockstep


def _reach(model: Any) -> int | None:
    try:
        return position_reach(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # no such positions


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__

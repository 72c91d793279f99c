"""Deferral for an engine that owns models, caches and batches: requests, rows, logits in place.

An engine hands over its logits a step at a time and says which request is in which row. For rows
that asked for a rule the token is drawn here, by
:func:`~tta_ext.decoding.deferral.step.deferral_step`, and the row's logits become -inf but at that
token: whatever sampler or verification the engine has, it has no choice. Other rows are left as
they are.

The one finite logit says where the token came from: its size is the deferred mass D times the
temperature, by which the engine's sampler divides it; its sign is negative where the proxy wrote
the token. An engine that returns the processed logits of drawn tokens so returns both
(:func:`source`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.deferral.step import AskProxy, deferral_step
from tta_ext.rules import Rule

__all__ = ["ARGUMENTS", "Asked", "Group", "Row", "RowTable", "Source", "draw", "group", "source"]

# What a request may say: flat names, flat values, which every engine's HTTP server lets through.
ARGUMENTS = (
    "tta_rule",
    "tta_param",
    "tta_critical",
    "tta_rule_temperature",
    "tta_seed",
    "tta_sequence",
)


class Source(NamedTuple):
    """Where a token came from.

    Attributes:
        deferred: whether the proxy wrote it.
        mass: D, the probability that a token of this position is deferred.
    """

    deferred: bool
    mass: float


def source(value: float) -> Source:
    """What a drawn token's processed logit says, if its request asked for a rule."""
    return Source(math.copysign(1.0, value) < 0, abs(value))


@dataclass(frozen=True)
class Asked:
    """A request's arguments, checked.

    Attributes:
        rule: with the request's temperature; 1 for greedy requests.
        seed, sequence: of its random stream.
        do_sample: False takes the mixture's most probable token.
        told: the request wants to know where its tokens came from.
    """

    rule: Rule
    seed: int = 0
    sequence: int = 0
    do_sample: bool = True
    told: bool = False

    @classmethod
    def parse(
        cls,
        extra: Mapping[str, Any] | None,
        *,
        temperature: float = 1.0,
        seed: int | None = None,
        told: bool = False,
    ) -> Asked | None:
        """From a request's extra arguments.

        Args:
            extra: :data:`ARGUMENTS` by name, and arguments of others, which are not looked at.
            temperature: the request's; 0 is greedy, and then that of rule and models is 1.
            seed: the request's, for one that does not name ``tta_seed``.
            told: see the attribute.

        Returns:
            None where there is no ``tta_`` argument.

        Raises:
            TypeError, ValueError: one sentence that names the argument.
        """
        given = {name: value for name, value in (extra or {}).items() if name.startswith("tta_")}
        if not given:
            return None
        unknown = sorted(given.keys() - set(ARGUMENTS))
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown, expected some of {', '.join(ARGUMENTS)}")
        if "tta_rule" not in given:
            raise ValueError(f"{min(given)} is given without tta_rule, expected a rule's name")
        rule = Rule(
            given["tta_rule"],
            _number(given, "tta_param"),
            given.get("tta_critical", "exclude"),
            temperature or 1.0,
            _number(given, "tta_rule_temperature"),
        )
        number = given.get("tta_seed", seed)
        if number is None and temperature > 0.0:
            raise ValueError(
                "tta_seed is missing, expected an integer: with tta_sequence (default 0) it names "
                "the random numbers of a sampled request"
            )
        sequence = _whole("tta_sequence", given.get("tta_sequence", 0))
        return cls(
            rule,
            rng.as_seed(_whole("tta_seed", number or 0)),
            rng.check_word("tta_sequence", sequence),
            temperature > 0.0,
            told,
        )


def _number(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise TypeError(f"{name} is {value!r}, expected a number")
    return None if value is None else float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    return value


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that one call of the operators serves, and what stays the same over their steps.

    Attributes:
        rows: which, ascending.
        index: the same, int64 on the device of the logits.
        asked: arguments of the first; all but ``param`` and ``sequence`` are everyone's.
        rule: with a ``param`` for each row where they differ.
        sequence: int64 ``[rows]``.
    """

    rows: list[int]
    index: Tensor
    asked: Asked
    rule: Rule
    sequence: Tensor


def group(asked: Mapping[int, Asked], device: torch.device) -> list[Group]:
    """As few groups of rows as one call each can serve."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, one in sorted(asked.items()):
        found.setdefault((one.rule.codes, one.seed, one.do_sample, one.told), []).append(row)
    groups = []
    for rows in found.values():
        first, *others = (asked[row].rule for row in rows)
        if any(other != first for other in others):
            values = [asked[row].rule.param for row in rows]
            first = first.replace(param=torch.tensor(values, dtype=torch.float64, device=device))
        sequence = [asked[row].sequence for row in rows]
        groups.append(
            Group(
                rows,
                torch.tensor(rows, device=device),
                asked[rows[0]],
                first,
                torch.tensor(sequence, dtype=torch.int64, device=device),
            )
        )
    return groups


# The proxy's logits of a group's rows, or a function that is asked for fewer of them.
Proxy: TypeAlias = "Callable[[Group], Tensor | AskProxy]"


def draw(logits: Tensor, groups: Sequence[Group], position: Tensor, proxy: Proxy) -> None:
    """Draw a token for each row of the groups and leave its logits no other choice.

    Args:
        logits: the base's ``[rows, V]``, after masks; written in place.
        groups: who asked.
        position: int64 ``[rows]``, tokens that stand before the one to draw.
        proxy: the other model's logits.

    Raises:
        ValueError: a row's logits make no law, with its sequence id and position.
    """
    for one in groups:
        asked, rule = one.asked, one.rule
        base = logits.index_select(0, one.index)
        at = position.index_select(0, one.index)
        # What the engine forbids the base (grammars, allowed ids), it forbids the proxy.
        banned = base == -math.inf
        other = proxy(one)
        if not isinstance(other, Tensor) and rule.needs_proxy:
            other = other(None, None)
        masked = (
            other.masked_fill(banned, -math.inf)
            if isinstance(other, Tensor)
            else _masked(other, banned)
        )
        drawn = deferral_step(
            base,
            masked,
            rule,
            seed=asked.seed,
            position=at,
            sequence=one.sequence,
            do_sample=asked.do_sample,
        )
        tokens = drawn.tokens
        if min(tokens) < 0:
            wrong = next(i for i, token in enumerate(tokens) if token < 0)
            raise ValueError(
                f"the logits of the request with tta_sequence {int(one.sequence[wrong])} have NaN "
                f"or +inf, or no finite value, at position {int(at[wrong])}: no token can be drawn"
            )
        value = base.new_zeros(len(tokens), 1)
        if asked.told:
            q = masked if isinstance(masked, Tensor) and rule.needs_proxy else None
            mass = ops.deferral_stats(base, q, rule=rule, check=False).deferred_mass
            sign = torch.tensor([-1.0 if flag else 1.0 for flag in drawn.from_proxy])
            value[:, 0] = (mass * rule.temperature).copysign(sign.to(mass))
        chosen = torch.full_like(base, -math.inf).scatter_(1, drawn.token.unsqueeze(1), value)
        logits.index_copy_(0, one.index, chosen)


def _masked(ask: AskProxy, banned: Tensor) -> AskProxy:
    def masked(rows: list[int] | None, index: Tensor | None) -> Tensor:
        mask = banned if index is None else banned.index_select(0, index)
        return ask(rows, index).masked_fill(mask, -math.inf)

    return masked


@dataclass(eq=False)
class Row:
    """A request that is in a row.

    Attributes:
        asked: its arguments.
        prompt: its prompt's token ids.
        output: its answer so far; the engine's own list, which grows.
    """

    asked: Asked
    prompt: Sequence[int]
    output: Sequence[int]

    @property
    def position(self) -> int:
        """Tokens that stand before the one to draw."""
        return len(self.prompt) + len(self.output)


class RowTable:
    """Which request is in which row of an engine that moves them about.

    Args:
        leave: called with each request that is gone.
    """

    def __init__(self, leave: Callable[[Row], None] = lambda row: None) -> None:
        self._leave = leave
        self._rows: dict[int, Row] = {}
        self._groups: list[Group] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} requests with a rule>"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    def put(self, number: int, row: Row | None) -> None:
        """A request is in a row now, None if it asked for nothing; what was there has left."""
        self.drop(number)
        if row is not None:
            self._rows[number] = row
            self._groups = None

    def drop(self, number: int) -> None:
        """A row's request has left."""
        row = self._rows.pop(number, None)
        if row is not None:
            self._leave(row)
            self._groups = None

    def move(self, origin: int, target: int, swap: bool = False) -> None:
        """A row's request is in another now, whose own has left or, with ``swap``, comes here."""
        moved = self._rows.pop(origin, None)
        if swap and target in self._rows:
            self._rows[origin] = self._rows.pop(target)
        self.put(target, moved)
        self._groups = None

    def draw(self, logits: Tensor, proxy: Proxy) -> None:
        """:func:`draw` for every request."""
        if not self._rows:
            return
        if self._groups is None:
            asked = {number: row.asked for number, row in self._rows.items()}
            self._groups = group(asked, logits.device)
        position = torch.zeros(len(logits), dtype=torch.int64)
        for number, row in self._rows.items():
            position[number] = row.position
        draw(logits, self._groups, position.to(logits.device), proxy)

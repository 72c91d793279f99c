"""The deferral rules: :class:`Rule`, and names, aliases and integer codes.

A rule decides with which probability ``mu(v)`` a token ``v`` proposed by the base model is rejected
and replaced by a token of the proxy model. ``p`` and ``q`` are the probabilities of base and proxy:

================== ==================================== =========== ===============
rule               ``mu(v) = 1`` when                   param       needs the proxy
================== ==================================== =========== ===============
``knapsack``       v is in the greedy knapsack          budget >= 0 no
``threshold``      ``p(v) < t``                         t           no
``confidence_bet`` ``p(v) < max q - margin``            margin      yes
``nudging``        ``max p < t`` (then all v)           t           no
``relative``       ``p(v) < max p - margin``            margin      no
``argmax``         ``p(v) < max p``                     None        no
``proxy_below``    ``q(v) < max p + margin``            margin      yes
``proxy_above``    ``q(v) > max p + margin``            margin      yes
``relative_ratio`` ``p(v) < max p (1 - a)``             a           no
``optimal``        ``max p < max q - a TV`` (all v)     a           yes
================== ==================================== =========== ===============

``TV`` is the total variation ``sum max(p - q, 0)``. ``knapsack`` and ``threshold`` are the primal
and the dual approximation of arXiv:2510.27017, ``confidence_bet`` is from arXiv:2604.16146,
``relative_ratio`` and ``optimal`` from speculative cascades, arXiv:2405.19261, with the base as the
model that drafts. Any real number is a parameter; ``relative_ratio`` is ``argmax`` at 0 and keeps
everything from 1 on, ``optimal`` compares the two confidences at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ARGMAX",
    "CONFIDENCE_BET",
    "CRITICAL",
    "EXCLUDE",
    "IMPLICIT_REWARD",
    "INCLUDE",
    "KNAPSACK",
    "NEEDS_PROXY",
    "NUDGING",
    "OPTIMAL",
    "PROXY_ABOVE",
    "PROXY_BELOW",
    "RELATIVE",
    "RELATIVE_RATIO",
    "RULES",
    "RULE_ALIASES",
    "RULE_NAMES",
    "SPLIT",
    "THRESHOLD",
    "Rule",
    "critical_code",
    "rule_code",
    "rule_name",
]

KNAPSACK: Final = 0
THRESHOLD: Final = 1
CONFIDENCE_BET: Final = 2
NUDGING: Final = 3
RELATIVE: Final = 4
ARGMAX: Final = 5
PROXY_BELOW: Final = 6
PROXY_ABOVE: Final = 7
RELATIVE_RATIO: Final = 8
OPTIMAL: Final = 9

RULE_NAMES: Final = (
    "knapsack",
    "threshold",
    "confidence_bet",
    "nudging",
    "relative",
    "argmax",
    "proxy_below",
    "proxy_above",
    "relative_ratio",
    "optimal",
)

# Names used by the papers and their code. An alias renames the rule and nothing else: `param` keeps
# the sign of the table above, so `max_q_plus` with +m in the source is margin=-m here.
RULE_ALIASES: Final = {
    "primal": "knapsack",
    "primal_kad": "knapsack",
    "budget_lr": "knapsack",
    "dual": "threshold",
    "dual_kad": "threshold",
    "token_wise": "threshold",
    "max_q_minus": "confidence_bet",
    "max_q_plus": "confidence_bet",
    "max": "nudging",
    "token_v2": "relative",
    "token_v3": "relative_ratio",
    "opt": "optimal",
    "token_max": "argmax",
    "max_p_plus": "proxy_below",
    "minus_max_p_plus": "proxy_above",
}

RULES: Final[dict[str, int]] = {name: code for code, name in enumerate(RULE_NAMES)} | {
    alias: RULE_NAMES.index(name) for alias, name in RULE_ALIASES.items()
}

# Stands where a rule's name does in the decoding methods, but is none: nothing is deferred, the
# models are mixed (tta_ext.ops.implicit_reward).
IMPLICIT_REWARD: Final = "implicit_reward"

# Rules that look at the proxy's probabilities before anything is drawn.
NEEDS_PROXY: Final = frozenset({CONFIDENCE_BET, PROXY_BELOW, PROXY_ABOVE, OPTIMAL})

EXCLUDE: Final = 0
INCLUDE: Final = 1
SPLIT: Final = 2

# What becomes of the first item that the knapsack has no room for.
CRITICAL: Final[dict[str, int]] = {"exclude": EXCLUDE, "include": INCLUDE, "split": SPLIT}


def rule_code(rule: str) -> int:
    """The integer code of a rule's name or alias; ``ValueError`` names what is accepted."""
    try:
        return RULES[rule]
    except (KeyError, TypeError):
        raise ValueError(
            f"rule is {rule!r}, expected one of {', '.join(RULE_NAMES)} "
            f"(or an alias: {', '.join(RULE_ALIASES)})"
        ) from None


def rule_name(rule: str) -> str:
    """The canonical name of a rule's name or alias."""
    return RULE_NAMES[rule_code(rule)]


def critical_code(critical: str) -> int:
    """The integer code of a critical-item policy; ``ValueError`` names what is accepted."""
    try:
        return CRITICAL[critical]
    except (KeyError, TypeError):
        raise ValueError(
            f"critical is {critical!r}, expected one of {', '.join(CRITICAL)}"
        ) from None


_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 1.1754943508222875e-38


def check_temperature(name: str, value: float) -> float:
    """A temperature whose inverse is a normal float32."""
    try:
        inverse = 1.0 / value
    except (ZeroDivisionError, OverflowError, TypeError):
        inverse = math.nan
    if not _FLOAT32_TINY <= inverse <= _FLOAT32_MAX:
        raise ValueError(
            f"{name} is {value!r}, expected a positive finite number between 2.94e-39 and 8.5e37"
        )
    return float(value)


# Rule, critical-item policy, temperature and temperature of the rule, as operators take them.
Codes = tuple[int, int, float, float]


def _check_param(rule: str, code: int, param: float | Tensor | None) -> float | Tensor:
    if code == ARGMAX:
        if param is None:
            return 0.0
        given = "a tensor" if isinstance(param, Tensor) else repr(param)
        raise ValueError(f"param is {given}, expected None for rule 'argmax'")
    if isinstance(param, Tensor):
        if param.dtype is not torch.float64:
            raise TypeError(f"param has dtype {param.dtype}, expected torch.float64")
        return param
    if param is None:
        raise ValueError(f"param is None, expected a number for rule {rule!r}")
    if isinstance(param, bool) or not isinstance(param, (int, float, torch.SymFloat)):
        raise TypeError(f"param is {param!r}, expected a number or a float64 tensor")
    if code == KNAPSACK and not param >= 0:
        raise ValueError(f"param is {param!r}, expected a budget >= 0 for rule 'knapsack'")
    if param != param:
        raise ValueError(f"param is {param!r}, expected a number for rule {rule!r}")
    return as_float("param", param)


def as_float(name: str, value: float) -> float:
    """The number as a float; ``ValueError`` for an int that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} is an int beyond float64, expected a number in its range"
        ) from None


def check_rule(
    rule: str,
    param: float | Tensor | None,
    critical: str,
    temperature: float,
    rule_temperature: float | None,
) -> tuple[float | Tensor, Codes]:
    """The parameter (0 for ``argmax``) and the codes; raises as :class:`Rule` does."""
    code, policy = rule_code(rule), critical_code(critical)
    temperature = check_temperature("temperature", temperature)
    if rule_temperature is None:
        rule_temperature = temperature
    else:
        rule_temperature = check_temperature("rule_temperature", rule_temperature)
    return _check_param(rule, code, param), (code, policy, temperature, rule_temperature)


Param = float | Tensor | list[float] | tuple[float, ...] | None


class _Changes(TypedDict, total=False):
    """What :meth:`Rule.replace` takes: the arguments of :class:`Rule`."""

    name: str
    param: Param
    critical: str
    temperature: float
    rule_temperature: float | None


@dataclass(frozen=True, eq=False, init=False)
class Rule:
    """A deferral rule with all that belongs to it, checked once and handed down whole.

    The operators of :mod:`tta_ext.ops` take one as ``rule=`` in place of a name, and then check
    nothing of it again but the shape and device of a ``param`` that has a value for each row.

    Args:
        name: one of :data:`RULE_NAMES` or of :data:`RULE_ALIASES`; kept as the canonical name.
        param: the rule's parameter (the table in :mod:`tta_ext.rules`): a number, a float64 tensor
            (one element, or one a row; for :func:`~tta_ext.ops.deferral_verify` also ``[B, K+1]``;
            not copied), or numbers, which become such a tensor; None for ``argmax``.
        critical: policy for the first item that does not fit the knapsack: ``"exclude"`` keeps it,
            ``"include"`` defers it too, ``"split"`` defers the fraction that fills the budget.
            (The *output* ``critical`` of the operators is the index of that item.)
        temperature: T > 0 of base, proxy and the resulting law.
        rule_temperature: T > 0 at which the rule looks at both models; None: ``temperature``.

    Attributes:
        codes: rule, critical-item policy, temperature and rule temperature as numbers, in the order
            in which ``torch.ops.tta_ext.*`` take them after the parameter.

    Raises:
        ValueError: unknown name or policy; a temperature that is not positive and finite; a
            parameter that is NaN, a negative budget, missing, or given for ``argmax``.
        TypeError: a parameter that is neither a number nor float64.

    Example:
        >>> rule = Rule("primal", 0.3, critical="split")
        >>> rule.name, rule.needs_proxy, rule.replace(param=0.5).param
        ('knapsack', False, 0.5)
    """

    name: str
    param: float | Tensor | None
    critical: str
    temperature: float
    rule_temperature: float | None
    codes: Codes = field(init=False, repr=False)

    def __init__(
        self,
        name: str = "threshold",
        param: Param = 0.4,
        critical: str = "exclude",
        temperature: float = 1.0,
        rule_temperature: float | None = None,
    ) -> None:
        rest = critical, temperature, rule_temperature
        if isinstance(param, (list, tuple)):
            numbers = [check_rule(name, value, *rest)[0] for value in param]
            param = torch.tensor(numbers, dtype=torch.float64)
        value, codes = check_rule(name, param, *rest)
        self.__dict__.update(
            name=RULE_NAMES[codes[0]],
            param=None if param is None else value,
            critical=critical,
            temperature=codes[2],
            rule_temperature=None if rule_temperature is None else codes[3],
            codes=codes,
        )

    @property
    def needs_proxy(self) -> bool:
        """Whether the rule looks at the proxy's probabilities before anything is drawn."""
        return self.codes[0] in NEEDS_PROXY

    def replace(self, **changes: Unpack[_Changes]) -> Rule:
        """The same rule but for the arguments named; checked like a new one."""
        kept = {name: getattr(self, name) for name in _Changes.__annotations__}
        return Rule(**{**kept, **changes})

    def select(self, index: int | slice | Tensor) -> Rule:
        """The rule for some of the rows, which have passed their checks.

        Args:
            index: a row, a slice of them, or their numbers as int64 (or a bool mask) on the
                device of ``param``. Only a ``param`` with a value for each row depends on it.
        """
        if not isinstance(self.param, Tensor) or self.param.numel() == 1:
            return self
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__, param=self.param[index])
        return chosen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        mine, its = self.param, other.param
        if isinstance(mine, Tensor) and isinstance(its, Tensor):
            return self.codes == other.codes and torch.equal(mine, its)
        return self.codes == other.codes and type(mine) is type(its) and mine == its

    def __hash__(self) -> int:
        return hash(self.codes)

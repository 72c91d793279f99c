"""Names, aliases and integer codes of the deferral rules and of the critical-item policies.

A rule decides with which probability ``mu(v)`` a token ``v`` proposed by the base model is rejected
and replaced by a token of the proxy model. ``p`` and ``q`` are the probabilities of base and proxy:

================== =========================== =========== ===============
rule               ``mu(v) = 1`` when          param       needs the proxy
================== =========================== =========== ===============
``knapsack``       v is in the greedy knapsack budget >= 0 no
``threshold``      ``p(v) < t``                t           no
``confidence_bet`` ``p(v) < max q - margin``   margin      yes
``nudging``        ``max p < t`` (then all v)  t           no
``relative``       ``p(v) < max p - margin``   margin      no
``argmax``         ``p(v) < max p``            None        no
``proxy_below``    ``q(v) < max p + margin``   margin      yes
``proxy_above``    ``q(v) > max p + margin``   margin      yes
================== =========================== =========== ===============

``knapsack`` and ``threshold`` are the primal and the dual approximation of arXiv:2510.27017,
``confidence_bet`` is from arXiv:2604.16146.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ARGMAX",
    "CONFIDENCE_BET",
    "CRITICAL",
    "EXCLUDE",
    "INCLUDE",
    "KNAPSACK",
    "NEEDS_PROXY",
    "NUDGING",
    "PROXY_ABOVE",
    "PROXY_BELOW",
    "RELATIVE",
    "RULES",
    "RULE_ALIASES",
    "RULE_NAMES",
    "SPLIT",
    "THRESHOLD",
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

RULE_NAMES: Final = (
    "knapsack",
    "threshold",
    "confidence_bet",
    "nudging",
    "relative",
    "argmax",
    "proxy_below",
    "proxy_above",
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
    "token_max": "argmax",
    "max_p_plus": "proxy_below",
    "minus_max_p_plus": "proxy_above",
}

RULES: Final[dict[str, int]] = {name: code for code, name in enumerate(RULE_NAMES)} | {
    alias: RULE_NAMES.index(name) for alias, name in RULE_ALIASES.items()
}

# Rules that look at the proxy's probabilities before anything is drawn.
NEEDS_PROXY: Final = frozenset({CONFIDENCE_BET, PROXY_BELOW, PROXY_ABOVE})

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

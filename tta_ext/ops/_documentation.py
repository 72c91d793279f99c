"""What many public operators say of the same arguments, written once and shown by each of them."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

SHARED = {
    "rule": """\
rule: name or alias of a rule in :mod:`tta_ext.rules`; or a :class:`~tta_ext.rules.Rule`,
    which holds the next four too: they then stay at their defaults (else ``TypeError``).
param: of the rule: a float, or float64 with one element or ``[B]``; None for ``argmax``.
critical: *policy* for the first item the knapsack has no room for: ``"exclude"`` keeps it,
    ``"include"`` defers it too, ``"split"`` defers the fraction that fills the budget.
temperature: T > 0 of p, q and pi.
rule_temperature: T > 0 of the p and q that the rule looks at; None: ``temperature``.""",
    "key": """\
seed: int or int64 with one element, bits as unsigned. With the next four it names the
    random numbers (:mod:`tta_ext.rng`): equal names give equal tokens in any batch.
position: tokens before this one; int, or int64 with one element or ``[B]``.
sequence: sequence id, likewise; None: the row number.
iteration: ``0 <= iteration < 4096``.
rollout: ``0 <= rollout < 65536``, likewise.
do_sample: False takes the most likely token, ties to the lowest id, and needs no names.""",
    "check": """\
check: raise ``ValueError`` for a row with NaN, +inf or only -inf (default on the CPU);
    otherwise""",
}


def documented(function: Function) -> Function:
    """Fill a docstring's ``{rule}``, ``{key}`` and ``{check}``, each at the start of a line.

    The name of a named tuple in braces stands for the attributes that its own docstring lists.
    """

    def text(found: re.Match[str]) -> str:
        indent, name = found.groups()
        block = SHARED.get(name)
        if block is None:
            listed = inspect.cleandoc(function.__globals__[name].__doc__)
            block = textwrap.dedent(listed.partition("Attributes:\n")[2])
        return textwrap.indent(block, indent)

    if function.__doc__:  # not under -OO
        function.__doc__ = re.sub(r"^( *)\{(\w+)\}", text, function.__doc__, flags=re.MULTILINE)
    return function

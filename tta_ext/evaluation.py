"""Rows of the evaluation: settings, figures, comparisons, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tta_ext import rules as rule_table

IMPLICIT_REWARD = "implicit_reward"
GREEDY, SAMPLED = "greedy", "sampled"
MODES = (GREEDY, SAMPLED)
# Not rules: the models alone.
BASE_ALONE, PROXY_ALONE = "base", "proxy"


@dataclass(frozen=True)
class Setting:
    """A rule, its parameter and its critical-item policy; or a model alone (param None)."""

    rule: str
    param: float | None = None
    critical: str = "exclude"

    @property
    def label(self) -> str:
        """``threshold 0.4``, ``knapsack 0.9 split``, ``base``."""
        parts = [self.rule] if self.param is None else [self.rule, f"{self.param:g}"]
        if self.critical != "exclude":
            parts.append(self.critical)
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From ``rule``, ``rule:param`` or ``rule:param:critical``.

        Raises:
            ValueError: an unknown rule or policy, or a parameter that is missing or not a number.
        """
        rule, _, rest = text.partition(":")
        param, _, critical = rest.partition(":")
        known = (BASE_ALONE, PROXY_ALONE, IMPLICIT_REWARD)
        rule = rule if rule in known else rule_table.rule_name(rule)
        rule_table.critical_code(critical or "exclude")
        if rule in (BASE_ALONE, PROXY_ALONE, "argmax"):
            if rest:
                raise ValueError(f"{rule} takes no parameter, got {text!r}")
            return cls(rule)
        try:
            return cls(rule, float(param), critical or "exclude")
        except ValueError:
            raise ValueError(f"{text!r} has no parameter; expected e.g. '{rule}:0.4'") from None


@dataclass
class Row:
    """One line of the table.

    Attributes:
        rule, param, critical: the setting.
        mode: ``"greedy"`` or ``"sampled"``.
        n: problems answered.
        exact, exact_stderr: share of exact matches (the right number in the answer format) and its
            standard error ``sqrt(x (1 - x) / n)``.
        lenient, lenient_stderr: the same without regard to format.
        formatted: share of answers in the format, right or wrong.
        deferred_rate: share of tokens that came from the proxy; None for implicit reward, where no
            token comes from one model alone.
        proxy_call_rate: share of tokens for which the proxy was asked.
        tokens: mean length of an answer, ``<eos>`` included.
        tokens_per_second: generated tokens per second of the decoding loop, the whole batch.
        outcomes, lenient_outcomes: the two scores of each problem, for paired differences; not in
            JSON.
    """

    rule: str
    param: float | None
    critical: str
    mode: str
    n: int
    exact: float
    exact_stderr: float
    lenient: float
    lenient_stderr: float
    formatted: float
    deferred_rate: float | None
    proxy_call_rate: float
    tokens: float
    tokens_per_second: float
    outcomes: tuple[bool, ...] = field(default=(), repr=False)
    lenient_outcomes: tuple[bool, ...] = field(default=(), repr=False)

    @property
    def setting(self) -> Setting:
        """The row's rule, parameter and policy."""
        return Setting(self.rule, self.param, self.critical)

    def as_dict(self) -> dict[str, Any]:
        """All fields but the outcomes, for JSON."""
        return {key: value for key, value in asdict(self).items() if "outcomes" not in key}


def difference(one: Row | Sequence[bool], other: Row | Sequence[bool]) -> tuple[float, float]:
    """Paired difference, ``one - other``, and its standard error.

    Args:
        one, other: rows, for exact match; or outcomes, problem by problem.

    Raises:
        ValueError: the rows answered different numbers of problems.
    """
    left = one.outcomes if isinstance(one, Row) else one
    right = other.outcomes if isinstance(other, Row) else other
    if len(left) != len(right) or not left:
        raise ValueError("rows are not paired: they answered different problems")
    deltas = [int(a) - int(b) for a, b in zip(left, right, strict=True)]
    mean = sum(deltas) / len(deltas)
    variance = sum((d - mean) ** 2 for d in deltas) / max(1, len(deltas) - 1)
    return mean, math.sqrt(variance / len(deltas))


def best_by_rule(rows: Iterable[Row], mode: str) -> dict[str, Row]:
    """The row of highest exact match for each rule; ties to the earlier."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.mode == mode and (row.rule not in best or row.exact > best[row.rule].exact):
            best[row.rule] = row
    return best


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The table's main comparisons for each mode, with paired standard errors.

    Parameters are chosen on the same problems, which flatters every swept rule alike.
    """
    result: dict[str, Any] = {}
    for mode in dict.fromkeys(row.mode for row in rows):
        best = best_by_rule(rows, mode)
        kad = [best[rule] for rule in ("knapsack", "threshold") if rule in best]
        if not kad or BASE_ALONE not in best or PROXY_ALONE not in best:
            continue
        top = max(kad, key=lambda row: row.exact)
        base, proxy = best[BASE_ALONE], best[PROXY_ALONE]
        steered = [row for rule, row in best.items() if rule not in (BASE_ALONE, PROXY_ALONE)]
        ranked = sorted(steered, key=lambda row: -row.exact)
        pairs = []
        for i, one in enumerate(ranked):
            for other in ranked[i + 1 :]:
                mean, error = difference(one, other)
                apart = mean / error if error else (math.inf if mean else 0.0)
                pairs.append(
                    {
                        "better": one.setting.label,
                        "worse": other.setting.label,
                        "difference": round(mean, 4),
                        "stderr": round(error, 4),
                        "stderrs_apart": None if math.isinf(apart) else round(apart, 1),
                    }
                )
        result[mode] = {
            "best_kad": top.setting.label,
            "exact": top.exact,
            "over_base": difference(top, base),
            "over_proxy": difference(top, proxy),
            "base_lenient": base.lenient,
            "over_base_lenient": difference(top.outcomes, base.lenient_outcomes),
            "best_by_rule": {row.rule: [row.setting.label, row.exact] for row in ranked},
            "differences": pairs,
        }
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "exact",
        "±",
        "lenient",
        "formatted",
        "proxy calls",
        "deferred",
        "tokens",
        "tokens/s",
    )
    lines = [f"| rule | mode | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        deferred = "-" if row.deferred_rate is None else f"{row.deferred_rate:.3f}"
        lines.append(
            f"| {row.setting.label} | {row.mode} | {row.exact:.3f} | {row.exact_stderr:.3f} "
            f"| {row.lenient:.3f} | {row.formatted:.3f} | {row.proxy_call_rate:.3f} "
            f"| {deferred} | {row.tokens:.1f} | {row.tokens_per_second:.0f} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """A Markdown page: how it was run, what was found, the table."""
    lines = [
        "# Demo pair: all rules",
        "",
        f"`{result['command']}`",
        "",
        f"n = {result['n']} held-out problems, seed {result['seed']}, pair {result['pair']}, torch "
        f"{result['torch']}, {result['threads']} thread(s), batches of {result['batch_size']}. "
        "Standard errors are binomial; differences are paired over problems. Parameters are chosen "
        "on the same problems, which flatters every swept rule alike.",
        *(["", result["note"]] if result.get("note") else []),
        "",
    ]
    for mode, found in result["summary"].items():
        base, proxy = found["over_base"], found["over_proxy"]
        gain, error = found["over_base_lenient"]
        verdict = "beats" if gain > 2 * error else "loses to" if gain < -2 * error else "equals"
        lines += [
            f"**{mode}**: {found['best_kad']} {found['exact']:.3f}; over the base alone "
            f"{base[0]:+.3f} ± {base[1]:.3f}, over the proxy alone {proxy[0]:+.3f} ± "
            f"{proxy[1]:.3f}; with its exact match it {verdict} (within two standard errors) the "
            f"base's format-free score {found['base_lenient']:.3f}: {gain:+.3f} ± {error:.3f}.",
            "",
            "| best of each rule | exact | behind the first |",
            "|---|---:|---:|",
        ]
        behind = {}
        for pair in found["differences"]:
            if pair["better"] == next(iter(found["best_by_rule"].values()))[0]:
                behind[pair["worse"]] = f"{pair['difference']:.3f} ± {pair['stderr']:.3f}"
        for label, exact in found["best_by_rule"].values():
            lines.append(f"| {label} | {exact:.3f} | {behind.get(label, '')} |")
        lines.append("")
    return "\n".join([*lines, table(rows), ""])

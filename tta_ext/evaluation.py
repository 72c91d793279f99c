"""Accuracy of deferral rules over a list of problems, next to each model alone.

:func:`evaluate` answers the same problems under every setting, greedily (argmax of the mixture) or
sampled at temperature 1. Random numbers are keyed by seed, problem and position, so a row's answers
do not depend on the other rows, on their order, or on whether a run was cut off and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from tta_ext import rng, rules
from tta_ext.intervals import difference, difference_interval, wilson_interval
from tta_ext.jobs import Crew, Here, Job, described
from tta_ext.journal import (
    WHOLE,
    Journal,
    Shard,
    decoded_parts,
    model_facts,
    resume_key,
    run_facts,
)
from tta_ext.problems import Score, Task, data_task, record_prompt

if TYPE_CHECKING:
    from tta_ext.decoding import DecodeStats, KnapsackDeferral

__all__ = [
    "BASE_ALONE",
    "GREEDY",
    "IMPLICIT_REWARD",
    "MODES",
    "PROXY_ALONE",
    "SAMPLED",
    "SHORT",
    "Answering",
    "Models",
    "Row",
    "Score",
    "Setting",
    "Task",
    "data_task",
    "difference",
    "difference_interval",
    "evaluate",
    "record_prompt",
]

IMPLICIT_REWARD = "implicit_reward"
GREEDY, SAMPLED = "greedy", "sampled"
MODES = (GREEDY, SAMPLED)
# Not rules: the models alone.
BASE_ALONE, PROXY_ALONE = "base", "proxy"


@dataclass(frozen=True)
class Setting:
    """A rule, its parameter, critical-item policy and temperatures; or a model alone (param
    None).
    """

    rule: str
    param: float | None = None
    critical: str = "exclude"
    temperature: float = 1.0
    rule_temperature: float | None = None

    def __post_init__(self) -> None:
        """``ValueError`` for a parameter that the rule cannot have, before anything is decoded."""
        if self.rule not in (BASE_ALONE, PROXY_ALONE, IMPLICIT_REWARD):
            rules.Rule(self.rule, self.param, self.critical)
        elif self.param is not None and not math.isfinite(self.param):
            raise ValueError(f"param is {self.param}, expected a finite number for {self.rule}")

    @property
    def label(self) -> str:
        """``threshold 0.4``, ``knapsack 0.9 split``, ``base``, ``threshold 0.4 T 0.7``."""
        parts = [self.rule] if self.param is None else [self.rule, f"{self.param:.12g}"]
        if self.critical != "exclude":
            parts.append(self.critical)
        if self.temperature != 1.0:
            parts.append(f"T {self.temperature:g}")
        if self.rule_temperature is not None:
            parts.append(f"rule T {self.rule_temperature:g}")
        return " ".join(parts)

    def facts(self) -> dict[str, Any]:
        """The fields for a resume key: temperatures only where they are not the defaults."""
        given = asdict(self)
        if self.temperature == 1.0:
            del given["temperature"]
        if self.rule_temperature is None:
            del given["rule_temperature"]
        return given

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From ``rule``, ``rule:param`` or ``rule:param:critical``.

        Raises:
            ValueError: an unknown rule or policy, a parameter that is missing or not a number, or
                one that the rule does not use.
        """
        rule, _, rest = text.partition(":")
        param, _, critical = rest.partition(":")
        known = (BASE_ALONE, PROXY_ALONE, IMPLICIT_REWARD)
        rule = rule if rule in known else rules.rule_name(rule)
        rules.critical_code(critical or "exclude")
        if rule in (BASE_ALONE, PROXY_ALONE, "argmax"):
            if rest:
                raise ValueError(f"{rule} takes no parameter, got {text!r}")
            return cls(rule)
        if critical and rule != "knapsack":
            raise ValueError(f"{rule} has no critical item, got {text!r}")
        try:
            value = float(param)
        except ValueError:
            raise ValueError(f"{text!r} has no parameter; expected e.g. '{rule}:0.4'") from None
        return cls(rule, value, critical or "exclude")


SHORT = (
    Setting(BASE_ALONE),
    Setting(PROXY_ALONE),
    Setting("knapsack", 0.5),
    Setting("knapsack", 0.9),
    Setting("threshold", 0.4),
    Setting("confidence_bet", 0.2),
    Setting("nudging", 0.4),
    Setting(IMPLICIT_REWARD, 1.0),
)


@dataclass(frozen=True)
class Models:
    """Loaded models that settings are tried on.

    Attributes:
        base, proxy: causal language models over one vocabulary.
        tokenizer, proxy_tokenizer: theirs; None: the proxy's is the base's.
        anti: the proxy before alignment, for implicit reward; None tilts by the proxy alone.
    """

    base: Any
    proxy: Any
    tokenizer: Any
    proxy_tokenizer: Any = None
    anti: Any = None

    def facts(self) -> dict[str, dict[str, str]]:
        """What a resume key holds of the models."""
        named = {"base": self.base, "proxy": self.proxy, "anti": self.anti}
        return {name: model_facts(model) for name, model in named.items() if model is not None}

    def decoder(self, setting: Setting, **options: Any) -> KnapsackDeferral:
        """What decodes a setting; options are the constructor's."""
        from tta_ext.decoding import KnapsackDeferral

        options |= setting.facts()
        if setting.rule == IMPLICIT_REWARD:
            options["anti"] = self.anti
        if setting.rule in (BASE_ALONE, PROXY_ALONE):
            # Threshold 0 rejects nothing: the first model alone; the second one is never run.
            options |= {"rule": "threshold", "param": 0.0}
        if setting.rule == PROXY_ALONE:
            own = self.proxy_tokenizer or self.tokenizer
            return KnapsackDeferral(
                self.proxy, self.base, own, proxy_tokenizer=self.tokenizer, **options
            )
        return KnapsackDeferral(
            self.base, self.proxy, self.tokenizer, proxy_tokenizer=self.proxy_tokenizer, **options
        )


@dataclass
class Row:
    """One setting in one mode.

    Attributes:
        setting: the setting; its fields are the row's own in JSON.
        mode: ``"greedy"`` or ``"sampled"``.
        n: problems, those that could not be answered (``failed``) counted as wrong.
        exact, exact_stderr: share of exact matches (the right answer in the wanted format) and its
            standard error ``sqrt(x (1 - x) / n)``.
        lenient, lenient_stderr: the same without regard to format.
        formatted: share of answers in the format, right or wrong.
        deferred_rate: share of tokens that came from the proxy; None for implicit reward, where no
            token comes from one model alone.
        proxy_call_rate: share of tokens for which the proxy was asked.
        tokens: mean length of an answer, the end token included.
        tokens_per_second: generated tokens per second of the decoding loop, the whole batch.
        failed: problems without an answer.
        outcomes, lenient_outcomes: the two scores of each problem, for paired differences; not in
            JSON.
    """

    setting: Setting
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
    failed: int = 0
    outcomes: tuple[bool, ...] = field(default=(), repr=False)
    lenient_outcomes: tuple[bool, ...] = field(default=(), repr=False)

    @property
    def exact_interval(self) -> tuple[float, float]:
        """95% Wilson interval of ``exact``."""
        return wilson_interval(sum(self.outcomes), self.n)

    @property
    def lenient_interval(self) -> tuple[float, float]:
        """95% Wilson interval of ``lenient``."""
        return wilson_interval(sum(self.lenient_outcomes), self.n)

    def as_dict(self) -> dict[str, Any]:
        """All fields but the outcomes, for JSON."""
        fields = {key: value for key, value in asdict(self).items() if "outcomes" not in key}
        return fields.pop("setting") | fields


def evaluate(
    models: Models | None,
    task: Task,
    settings: Iterable[Setting | str] = SHORT,
    *,
    modes: Sequence[str] = MODES,
    seed: int = 0,
    batch_size: int = 100,
    max_new_tokens: int | None = None,
    journal: Journal | None = None,
    progress: Callable[[int, int], object] | None = None,
    failures: dict[int, Exception] | None = None,
    shard: Shard = WHOLE,
    crew: Crew | None = None,
) -> Iterator[Row]:
    """Answer a task's problems under every setting and mode.

    Args:
        models, task: what decodes, and what is asked.
        settings: settings, or texts that :meth:`Setting.parse` reads (``"base"``,
            ``"threshold:0.4"``, ``"knapsack:0.9:split"``, ``"implicit_reward:1"``).
        modes: any of ``"greedy"`` and ``"sampled"``.
        seed: seed of the sampled rows; the problems do not depend on it.
        batch_size: problems decoded together.
        max_new_tokens: tokens after which an answer ends; None: the task's.
        journal: keeps finished batches; a run with the same journal takes them over.
        progress: called after each batch with its numbers of problems and of generated tokens (0:
            taken over from the journal).
        failures: takes the errors of problems that cannot be answered, by their places; they count
            as wrong, and stop no other. None: the first error is raised.
        shard: the part of the batches to answer; rows are of its problems alone.
        crew: decodes in place of ``models``, by an :class:`Answering` over the task's prompts.

    Yields:
        A :class:`Row` for each setting and mode, in that order, as it is finished. The same
        arguments give the same rows, times apart.

    Raises:
        ValueError: an unknown setting or mode, or a number out of range.
    """
    from tta_ext.decoding import DecodeStats

    chosen = [one if isinstance(one, Setting) else Setting.parse(one) for one in settings]
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    options: dict[str, Any] = {"seed": rng.resolve_seed(seed)}
    options["max_new_tokens"] = max_new_tokens or task.max_new_tokens
    if crew is None:
        if models is None:
            raise ValueError("neither models nor a crew is given, and one of them decodes")
        crew = Here(Answering(models, task.prompts))
    facts = {"method": "evaluate", "models": journal and crew.facts(), **options}
    journal = Journal(None) if journal is None else journal
    counted = progress or (lambda problems, tokens: None)
    total, whole = len(task.prompts), list(range(len(task.prompts)))
    batches = shard.of([whole[at : at + batch_size] for at in range(0, total, batch_size)])
    kinds = [(setting, mode) for setting, mode in product(chosen, modes) if batches]
    how = [facts | setting.facts() | {"mode": mode} for setting, mode in kinds]
    texts: list[dict[int, str]] = [{} for _ in kinds]
    stats = [DecodeStats() for _ in kinds]
    waiting = [sum(map(len, batches)) for _ in kinds]

    def key(kind: int, places: list[int]) -> str:
        prompts = [task.prompts[place] for place in places]
        return resume_key(**how[kind], start=places[0], prompts=prompts)

    def take(kind: int, places: list[int], record: dict[str, Any], new: bool) -> None:
        spent = DecodeStats(**record["stats"])
        if not all(isinstance(text, str) for text in record["texts"]):
            raise TypeError("texts are no texts")
        texts[kind] |= zip(places, record["texts"], strict=True)
        stats[kind] += spent
        waiting[kind] -= len(places)
        counted(len(places), spent.tokens if new else 0)

    def jobs() -> Iterator[Job]:
        for (kind, what), batch in product(enumerate(kinds), batches):
            for places in decoded_parts(batch, lambda part: key(kind, part) in known):  # noqa: B023
                if record := known.get(key(kind, places)):
                    with journal.reading():
                        take(kind, places, record, False)
                else:
                    yield (kind, *what, options), places

    def row(kind: int) -> Row:
        said, wrong = texts[kind], Score(False, False, False)
        places = [place for batch in batches for place in batch]
        scores = [task.score(place, said[place]) if place in said else wrong for place in places]
        return _row(*kinds[kind], scores, stats[kind], len(scores) - len(said))

    known, told = dict(journal.records), 0
    for (kind, *_), places, found in crew.map(jobs()):
        if isinstance(found, Exception):
            if failures is None:
                raise found
            failures[places[0]] = found
            waiting[kind] -= 1
            counted(1, 0)
        else:
            record = {"start": places[0], "of": total, **found}
            journal.add({key(kind, places): record | {"run": run_facts(**how[kind])}})
            take(kind, places, record, True)
        while told < len(kinds) and not waiting[told]:
            yield row(told)
            told += 1
    yield from map(row, range(told, len(kinds)))


class Answering:
    """Models over a task's prompts: a :class:`tta_ext.jobs.Machine`, :func:`evaluate`'s."""

    def __init__(self, models: Models, prompts: Sequence[Any]) -> None:
        self.models, self.prompts = models, prompts
        self.facts: Callable[[], dict[str, Any]] = models.facts
        self._setting: Setting | None = None

    __repr__ = described

    def decode(self, what: Any, places: list[int]) -> dict[str, Any]:
        _, setting, mode, options = what
        if setting != self._setting:
            self._decoder, self._setting = self.models.decoder(setting), setting
        from tta_ext.decoding.runtime.prompts import PromptList

        chosen = PromptList(self.prompts[place] for place in places)
        options = options | self.options(places)
        made = self._decoder.generate(chosen, do_sample=mode == SAMPLED, sequence=places, **options)
        return {"texts": made.texts, "stats": vars(made.stats)}

    def options(self, places: list[int]) -> dict[str, Any]:
        """More arguments of ``generate`` for these prompts; none here."""
        return {}


def _row(
    setting: Setting, mode: str, scores: Sequence[Score], stats: DecodeStats, failed: int
) -> Row:
    count, tokens = len(scores), max(1, stats.tokens)
    exact, lenient, formatted = (sum(column) / count for column in zip(*scores, strict=True))
    deferred: float | None = stats.deferred_tokens / tokens
    calls = (tokens - stats.proxy_rows_saved) / tokens
    if setting.rule == PROXY_ALONE:
        deferred = calls = 1.0
    elif setting.rule == IMPLICIT_REWARD:
        deferred = None
    return Row(
        setting=setting,
        mode=mode,
        n=count,
        exact=exact,
        exact_stderr=math.sqrt(exact * (1 - exact) / count),
        lenient=lenient,
        lenient_stderr=math.sqrt(lenient * (1 - lenient) / count),
        formatted=formatted,
        deferred_rate=deferred,
        proxy_call_rate=calls,
        tokens=stats.tokens / count,
        tokens_per_second=stats.tokens_per_second,
        failed=failed,
        outcomes=tuple(score.exact for score in scores),
        lenient_outcomes=tuple(score.lenient for score in scores),
    )

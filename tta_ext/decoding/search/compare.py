"""Methods of search by reward side by side: same prompts, same reward, equal samples or seconds.

Each method answers each prompt; differences are taken prompt by prompt, so what makes a prompt
easy drops out. With a journal, every finished answer is a line of a JSONL file, on the disk before
the next begins, and a run that was cut short goes on from there. Random numbers are keyed by the
prompt's place in the list, so nothing depends on the order or on a resume.

A *sample* is one answer's worth of generated tokens. How often the reward was asked, which is more
for methods that judge unfinished answers, is reported beside it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.runtime.prompts import PromptList
from tta_ext.decoding.search.aisp import AdaptiveImportanceSampling
from tta_ext.decoding.search.base import SearchMethod
from tta_ext.decoding.search.best_of_n import BestOfN
from tta_ext.decoding.search.chunk_beam import ChunkBeamSearch
from tta_ext.decoding.search.outcome import SearchResult
from tta_ext.decoding.search.paired import Paired, measure, paired, paired_scores, summary
from tta_ext.decoding.search.re_control import ReControlSearch
from tta_ext.decoding.search.reward_guided import RewardGuidedSearch
from tta_ext.decoding.search.settings import SearchSettings, settings_facts
from tta_ext.jobs import Crew, Here, Job, described
from tta_ext.journal import WHOLE, Journal, Shard, model_facts, resume_key, run_facts
from tta_ext.plots import curve_means, plot

__all__ = [
    "METHODS",
    "Comparing",
    "Contestant",
    "Paired",
    "compare",
    "curve_means",
    "literal",
    "measure",
    "paired",
    "paired_scores",
    "parse_settings",
    "plot",
    "record_of",
    "resolved",
    "summary",
]

METHODS: dict[str, type[SearchMethod[Any]]] = {
    "aisp": AdaptiveImportanceSampling,
    "best_of_n": BestOfN,
    "args": RewardGuidedSearch,
    "chunk_beam": ChunkBeamSearch,
    "re_control": ReControlSearch,
}


def method_class(name: str) -> type[SearchMethod[Any]]:
    """The class of a method; ``ValueError`` if there is none of that name."""
    try:
        return METHODS[name.replace("-", "_")]
    except KeyError:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}") from None


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """Settings from ``name=value`` texts; values are Python literals or ``inf``, or else strings.

    Example:
        >>> parse_settings(["n=16", "sigma_unit=logit", "lam=None", "kl_budget=inf"])
        {'n': 16, 'sigma_unit': 'logit', 'lam': None, 'kl_budget': inf}

    Raises:
        ValueError: an item that is no such text, or of a name that was there already.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"setting is {item!r}, expected name=value")
        if name.strip() in found:
            raise ValueError(f"setting {name.strip()} is given twice")
        found[name.strip()] = literal(value.strip())
    return found


def literal(text: str) -> Any:
    """A Python literal or ``inf``, or else the text."""
    if text == "inf":
        return math.inf
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def setting_types(kind: type[SearchMethod[Any]]) -> dict[str, tuple[type, ...]]:
    """What each setting of a method may be; without types: one of a few texts."""
    found = {}
    for name, hint in get_type_hints(kind.settings_type).items():
        kinds = get_args(hint) or (hint,)
        found[name] = tuple(get_origin(k) or k for k in kinds if get_origin(k) is not Literal)
    return found


def typed(kind: type[SearchMethod[Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are, after a look at names and types.

    Raises:
        ValueError: a setting that the method does not have, or a value of a wrong type.
    """
    hints, types = get_type_hints(kind.settings_type), setting_types(kind)
    for name, value in settings.items():
        if name not in hints:
            known = ", ".join(hints)
            raise ValueError(f"{kind.name} has no setting {name!r}, expected one of {known}")
        allowed = types[name]
        allowed += (int,) if float in allowed else ()
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
        if allowed and wrong:
            expected = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise ValueError(f"setting {name} is {value!r}, expected {expected}")
    return settings


@dataclass(frozen=True)
class Contestant:
    """A method with settings, under a name of its own.

    Attributes:
        label: what tables call it.
        method: one of :data:`METHODS`.
        settings: settings that differ from the method's defaults.
    """

    label: str
    method: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Contestant:
        """From ``method``, ``method:name=value,...`` or ``label=method:name=value,...``.

        Raises:
            ValueError: it is none of these.
        """
        head, _, rest = text.partition(":")
        label, equals, method = head.rpartition("=")
        if equals and not label.strip():
            raise ValueError(f"method is {text!r}, whose label is empty")
        settings = parse_settings(filter(None, rest.split(",")))
        return cls(label if equals else text, method_class(method).name, settings)

    def resolved(
        self, common: dict[str, Any], samples: int | None, seconds: float | None
    ) -> SearchSettings:
        """All settings, with the budget worked in."""
        kind = METHODS[self.method]
        settings: SearchSettings = kind.settings_type(**typed(kind, common | self.settings))
        if samples is not None:
            settings = settings.for_samples(samples)
        if seconds is not None:
            settings = settings.for_seconds(seconds)
        return settings


def compare(
    model: Any,
    tokenizer: Any,
    reward: Reward | None,
    prompts: Sequence[Any],
    contestants: Sequence[Contestant],
    *,
    samples: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    common: dict[str, Any] | None = None,
    prompts_at_once: int = 1,
    tag: Any = None,
    journal: Journal | None = None,
    progress: Callable[[int, int], object] | None = None,
    failures: dict[int, Exception] | None = None,
    shard: Shard = WHOLE,
    crew: Crew | None = None,
    metrics: Mapping[str, Reward] | None = None,
) -> list[dict[str, Any]]:
    """Let every contestant answer every prompt.

    Args:
        model, tokenizer, reward: as for the methods.
        prompts: see :meth:`SearchMethod.generate`.
        contestants: what to compare; their labels must differ.
        samples: answers' worth of tokens for each; None leaves the settings alone.
        seconds: wall-clock for each prompt; the iteration in which it passes is finished.
        seed: of all runs.
        common: settings for all of them.
        prompts_at_once: prompts in a batch; times are then shares of the batch's, and a limit in
            seconds is the batch's.
        tag: names model and reward in the journal (:func:`tta_ext.journal.model_facts`); records
            with another are not taken over.
        journal: keeps finished answers; those that it has are taken over.
        progress: called after each batch with its numbers of answers and of generated tokens (0:
            taken over from the journal).
        failures: takes the errors of prompts that a contestant cannot answer, by their places; such
            prompts are left out, and stop no other. None: the first error is raised.
        shard: the part of the prompts to answer; they keep their places.
        crew: answers in place of model, tokenizer and reward, by a :class:`Comparing` over the
            same prompts and settings (:func:`resolved`).
        metrics: rewards that decide nothing, by name: what each says of the best answers is in
            ``record["metrics"]`` (:func:`measure`), and in no journal.

    Returns:
        One record for each prompt and contestant, in that order.

    Raises:
        ValueError: labels that are not different, both budgets at once, or a setting out of range.
    """
    labels = [one.label for one in contestants]
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels are {labels}, expected different ones; write label=method:...")
    if samples is not None and seconds is not None:
        raise ValueError("samples and seconds are given; expected one budget")
    journal = Journal(None) if journal is None else journal
    if prompts_at_once < 1:
        raise ValueError(f"prompts_at_once is {prompts_at_once}, expected at least 1")
    settings = resolved(contestants, common, samples, seconds)
    if crew is None:
        if reward is None:
            raise ValueError("neither a reward nor a crew is given, and one of them decides")
        crew = Here(Comparing(model, tokenizer, reward, prompts, settings))
    places = shard.of(range(len(prompts)))
    how = {
        label: {"method": name, "seed": seed, "tag": tag, **settings_facts(chosen)}
        for label, (name, chosen) in settings.items()
    }
    keys = {
        (place, label): resume_key(**how[label], prompt=prompts[place], place=place)
        for label in labels
        for place in places
    }
    counted = progress or (lambda answers, tokens: None)
    known = set(journal.records)

    def jobs() -> Iterator[Job]:
        for first in range(0, len(places), prompts_at_once):
            for label in labels:
                part = places[first : first + prompts_at_once]
                missing = [place for place in part if keys[place, label] not in known]
                counted(len(part) - len(missing), 0)
                if missing:
                    yield (label, seed), missing

    for (label, _), done, found in crew.map(jobs()):
        if isinstance(found, Exception):
            if failures is None:
                raise found
            failures[done[0]] = found
            counted(1, 0)
            continue
        records, tokens = found
        head, run = {"of": len(prompts), "label": label}, run_facts(**how[label])
        journal.add(
            {
                keys[place, label]: {"index": place, **head, **record, "run": run}
                for place, record in zip(done, records, strict=True)
            }
        )
        counted(len(done), tokens)
    # A label is only a name: it may have changed since the journal was written.
    with journal.reading():
        answers = [
            _numbers(journal.records[keys[place, label]]) | {"label": label}
            for place in places
            if not (failures and place in failures)
            for label in labels
        ]
    measure(answers, metrics or {})
    return answers


def resolved(
    contestants: Sequence[Contestant],
    common: dict[str, Any] | None,
    samples: int | None,
    seconds: float | None,
) -> dict[str, tuple[str, SearchSettings]]:
    """Each contestant's method and settings, by label; arguments as :func:`compare`'s."""
    return {
        one.label: (one.method, one.resolved(common or {}, samples, seconds)) for one in contestants
    }


class Comparing:
    """Methods over a list of prompts: a :class:`tta_ext.jobs.Machine`, :func:`compare`'s."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reward: Reward,
        prompts: Sequence[Any],
        settings: dict[str, tuple[str, SearchSettings]],
    ) -> None:
        self.model, self.prompts = model, prompts
        self.methods: dict[str, SearchMethod[Any]] = {}
        for label, (name, chosen) in settings.items():
            self.methods[label] = METHODS[name](
                model, reward, tokenizer, probe=not self.methods, **asdict(chosen)
            )

    __repr__ = described

    def facts(self) -> dict[str, Any]:
        return {"model": model_facts(self.model)}

    def decode(self, what: tuple[str, int], places: list[int]) -> tuple[list[dict[str, Any]], int]:
        label, seed = what
        chosen = PromptList(self.prompts[place] for place in places)
        result = self.methods[label].generate(chosen, seed=seed, sequence=places)
        return [record_of(result, at) for at in range(len(places))], result.timing.tokens


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A record, if it is whole, with the infinite rewards that JSON had to write as texts."""
    for name in ("index", "prompt", "text", "timing"):
        if name not in record:
            raise KeyError(name)
    curve = [
        {name: float(x) if isinstance(x, str) else x for name, x in point.items()}
        for point in record["curve"]
    ]
    return record | {"reward": float(record["reward"]), "curve": curve}


def record_of(result: SearchResult, at: int) -> dict[str, Any]:
    """What a journal keeps of one prompt of a result; times are shares of the batch's."""
    count = len(result)
    timing = {name: value / count for name, value in result.timing.as_dict().items()}
    timing["tokens"] = result.curves[at][-1].tokens
    curve = [asdict(step) | {"seconds": step.seconds / count} for step in result.curves[at]]
    return {
        "prompt": result.prompts[at],
        "method": result.method,
        "reward": result.best[at].reward,
        "text": result.best[at].text,
        "curve": curve,
        "timing": timing,
        "training": result.training,
    }

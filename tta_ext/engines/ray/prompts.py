"""Prompts answered by Ray workers, or in a pipeline of Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tta_ext.engines.ray.workers import Workers
from tta_ext.journal import Journal, resume_key, run_facts

__all__ = ["Decoder", "map_prompts"]


class Answers:
    """A machine over a list of prompts, of anything that has ``generate``."""

    def __init__(self, load: Callable[[], Any], prompts: Sequence[Any]) -> None:
        self.decoder, self.prompts = load(), prompts

    def facts(self) -> dict[str, Any]:
        return {}

    def decode(self, what: dict[str, Any], places: list[int]) -> list[dict[str, Any]]:
        chosen = [self.prompts[place] for place in places]
        return _records(self.decoder.generate(chosen, sequence=places, **what))


def _records(result: Any) -> list[dict[str, Any]]:
    """What is kept of each answer of a :class:`Generation` or a :class:`SearchResult`."""
    if hasattr(result, "best"):
        return [
            {"text": one.text, "tokens": one.tokens, "finish": one.finish, "reward": one.reward}
            for one in result.best
        ]
    texts = result.texts or [None] * len(result)
    rows = zip(texts, result.tokens, result.finish, strict=True)
    return [{"text": text, "tokens": ids, "finish": finish} for text, ids, finish in rows]


def map_prompts(
    load: Callable[[], Any],
    prompts: Iterable[Any],
    *,
    seed: int,
    workers: int = 1,
    batch_size: int = 16,
    output: str | Path | None = None,
    tag: Any = None,
    address: str | None = None,
    gpus_per_worker: float = 0.0,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answer prompts by Ray workers; what one process answers, whatever their number.

    Args:
        load: makes the decoder, a ``KnapsackDeferral`` or a method of search, in each worker.
        prompts: as ``generate`` takes them; the sequence id of each is its place.
        seed: of all answers.
        workers, address, gpus_per_worker: see :class:`Workers`.
        batch_size: prompts decoded together.
        output: a file (:class:`~tta_ext.journal.Journal`) that each batch is appended to as it
            comes; a run that was cut short goes on from it.
        tag: names what ``load`` makes, as JSON; wanted with ``output``, where answers of another
            tag are not taken over.
        progress: called after each batch with its number of prompts.
        options: of ``generate``, for all prompts.

    Returns:
        A record for each prompt, in order: ``index``, ``text``, ``tokens``, ``finish``, with a
        search ``reward``; ``error`` instead where the prompt could not be answered.

    Raises:
        ValueError: ``output`` without ``tag``, or a number out of range.
    """
    if output is not None and tag is None:
        raise ValueError("output is given without tag, which names what load() makes")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    asked = list(prompts)
    facts = {"method": "map_prompts", "tag": tag, "seed": seed, "options": options}
    keys = [resume_key(**facts, prompt=one, place=place) for place, one in enumerate(asked)]
    with Journal(output) as journal:
        known = [place for place, key in enumerate(keys) if _answered(journal.records.get(key))]
        todo = iter(sorted(set(range(len(asked))) - set(known)))
        jobs = list(iter(lambda: list(islice(todo, batch_size)), []))
        if progress is not None:
            progress(len(known))
        if jobs:
            with Workers(
                lambda: Answers(load, asked), workers, address=address, gpus=gpus_per_worker
            ) as crew:
                for _, places, found in crew.map(({**options, "seed": seed}, job) for job in jobs):
                    if isinstance(found, Exception):
                        found = [{"error": str(found)}]
                    head = {"of": len(asked), "run": run_facts(**facts)}
                    journal.add(
                        {
                            keys[place]: {"index": place, "prompt": asked[place], **one, **head}
                            for place, one in zip(places, found, strict=True)
                        }
                    )
                    if progress is not None:
                        progress(len(places))
        return [journal.records[key] for key in keys]


def _answered(record: dict[str, Any] | None) -> bool:
    return record is not None and "error" not in record


class Decoder:
    """A stage of a Ray Data pipeline: ``dataset.map_batches(Decoder, ...)``.

    Rows keep their columns and get ``text``, ``finish`` and ``tokens``. Ray Data keeps no order
    after a worker has died, so rows must carry their index.

    Args:
        load: makes the decoder, as in :func:`map_prompts`.
        seed: of all answers.
        prompt, index: columns of the prompt and of its sequence id, an int >= 0 that no other row
            has.
        options: of ``generate``.

    Example:
        >>> dataset.map_batches(
        ...     Decoder,
        ...     fn_constructor_kwargs={"load": load_pair, "seed": 0, "max_new_tokens": 64},
        ...     batch_size=16,
        ...     compute=ray.data.ActorPoolStrategy(size=4),
        ... )
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        seed: int,
        prompt: str = "prompt",
        index: str = "index",
        **options: Any,
    ) -> None:
        self.decoder, self.columns = load(), (prompt, index)
        self.options = {**options, "seed": seed}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name in self.columns:
            if name not in batch:
                raise ValueError(f"rows have no column {name!r}, expected {self.columns}")
        prompt, index = self.columns
        result = self.decoder.generate(
            [one if isinstance(one, str) else list(one) for one in batch[prompt]],
            sequence=[int(i) for i in batch[index]],
            **self.options,
        )
        rows = _records(result)
        return {**batch, **{name: [row[name] for row in rows] for name in rows[0]}}

"""Who does the jobs of a command: this process, or workers elsewhere.

A *machine* has loaded its models and answers places of a list of prompts. A *crew* has one machine
or several and does jobs with them: what to do, and the places to do it for. Random streams are
named by places and batches are made before they are handed out, so every crew draws the same
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeAlias

from tta_ext.journal import decode_all

__all__ = ["Crew", "Done", "Here", "Job", "Machine", "described"]

# What to do, and the places that are decoded together.
Job: TypeAlias = "tuple[Any, list[int]]"
# What was done, for which of its places, and what came of it: :func:`tta_ext.journal.decode_all`.
Done: TypeAlias = "tuple[Any, list[int], Any]"


class Machine(Protocol):
    """Loaded models over a list of prompts."""

    def facts(self) -> dict[str, Any]:
        """What a resume key holds of the models."""

    def decode(self, what: Any, places: list[int]) -> Any:
        """The answers to some places of the list."""


def described(machine: Any) -> str:
    """The ``repr`` of a machine that has its list as ``prompts``."""
    return f"<{type(machine).__name__}: {len(machine.prompts)} prompts>"


class Crew(Protocol):
    """Does jobs."""

    def facts(self) -> dict[str, Any]:
        """:meth:`Machine.facts`, of one machine, as all are alike."""

    def map(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Do jobs; each result as it comes, in any order, an ``Exception`` where a place failed."""


class Here:
    """One machine, in this process; jobs are done in order.

    Args:
        machine: the machine.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.machine!r})"

    def facts(self) -> dict[str, Any]:
        return self.machine.facts()

    def map(self, jobs: Iterable[Job]) -> Iterator[Done]:
        for what, places in jobs:
            for part, result in decode_all(partial(self.machine.decode, what), places):
                yield what, part, result

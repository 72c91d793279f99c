"""Ray actors that load once and work often."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from tta_ext._version import install
from tta_ext.jobs import Done, Here, Job

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of a Ray that is started here: workers do this process's work, and give way no more than it.
os.environ.setdefault("RAY_worker_niceness", "0")
try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util import ActorPool
except ModuleNotFoundError:
    raise ImportError(f"engine ray needs Ray: {install('ray')}") from None

__all__ = ["Workers", "connect"]

# Of one worker; where it dies this often a restart mends nothing.
RESTARTS = 16


class _Worker:
    """An actor: what ``make`` makes, and calls of its methods.

    An error of ``make`` waits for the first call, as Ray would take it for a death.
    """

    def __init__(self, make: Callable[[], Any], threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.error: Exception | None = None
        try:
            self.made = make()
        except Exception as error:
            self.error = error

    def call(self, name: str, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return getattr(self.made, name)(*arguments)

    def decode(self, what: Any, places: list[int]) -> list[Done]:
        if self.error is not None:
            raise self.error
        return list(Here(self.made).map([(what, places)]))


def connect(address: str | None, cores: int) -> None:
    """Connect to Ray unless this process is connected: to a cluster, else to one started here.

    Args:
        address: of the cluster; None starts one on this machine.
        cores: that workers will ask for; here they share those that there are.
    """
    if not ray.is_initialized():
        here: dict[str, Any] = {"include_dashboard": False}
        here["num_cpus"] = max(os.cpu_count() or 1, cores)
        ray.init(address, log_to_driver=False, logging_level="ERROR", **({} if address else here))


class Workers:
    """Actors that each hold what ``make`` makes; of machines, a :class:`tta_ext.jobs.Crew`.

    Args:
        make: small; loads models and returns what works with them, such as a
            :class:`~tta_ext.jobs.Machine`; called in every worker, and again in one that died.
        count: workers.
        address: of a Ray cluster, or ``"auto"``; None: the Ray that this process is connected to,
            else one on this machine.
        gpus: GPUs of each worker, parts allowed; several for a model that ``device_map`` spreads.
        cpus: cores that Ray counts for each worker.
        threads: torch's in each worker; None: one for each of its cores.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        count: int = 1,
        *,
        address: str | None = None,
        gpus: float = 0.0,
        cpus: float = 1.0,
        threads: int | None = None,
    ) -> None:
        for name, value, low in (("workers", count, 1), ("gpus", gpus, 0), ("cpus", cpus, 0)):
            if not value >= low:
                raise ValueError(f"{name} is {value}, expected at least {low}")
        connect(address, round(count * cpus))
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": RESTARTS}
        actor = ray.remote(_Worker).options(**options, max_task_retries=-1)
        self.actors = [actor.remote(make, threads) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.actors)

    def facts(self) -> dict[str, Any]:
        """:meth:`Machine.facts` of one worker's machine."""
        facts: dict[str, Any] = self.call([0], "facts")[0]
        return facts

    def map(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Do jobs with whichever workers are free; each result as it comes.

        Raises:
            RuntimeError: a worker died too often.
        """
        pool = ActorPool(self.actors)
        results = pool.map_unordered(lambda actor, job: actor.decode.remote(*job), jobs)
        while True:
            found = _told(lambda: next(results, None))
            if found is None:
                return
            yield from found

    def call(self, which: Sequence[int], name: str, *columns: Any) -> list[Any]:
        """Call a method of several workers at once, by number; the results in order.

        Args:
            which: a worker's number for each call; one worker does its calls in order.
            name: the method.
            columns: of each argument, its value in each call; or what ``ray.put`` returned, for all
                calls.
        """
        shared = [[one] * len(which) if isinstance(one, ray.ObjectRef) else one for one in columns]
        calls = [
            self.actors[worker].call.remote(name, *arguments)
            for worker, *arguments in zip(which, *shared, strict=True)
        ]
        results: list[Any] = _told(lambda: ray.get(calls))
        return results

    def close(self) -> None:
        """End the workers; a Ray that was started for them stays until this process ends."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _told(get: Callable[[], Any]) -> Any:
    """What Ray gets; the errors of our own code as they were raised."""
    try:
        return get()
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        text = " ".join(str(error).split())
        raise RuntimeError(f"a Ray worker is lost for good: {text[-600:]}") from error

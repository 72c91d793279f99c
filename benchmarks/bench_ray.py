"""Ray beside the plain process: equal answers for 1, 2, 4 workers, with and without kills; cost.

    python -m benchmarks.bench_ray [--workers 1,2,4] [--kills 1] [--seed 0] [--output FILE]

The shipped pair answers (KAD) and is searched (AISP, best-of-n). Each line compares one run with
the plain process: answers that are the same tokens, with AISP rewards and u bit for bit. A run with
kills has a worker killed (SIGKILL) at a random moment of the run; it counts only if the worker died
before the run ended. Workers are warm, so that what is timed is the work; where a worker dies the
time holds its restart. The ratio is the time of one worker over that of the plain process, the
median of seven pairs of runs taken in turn.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import eq
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch

from .harness import check_files, report
from .harness import table as markdown

PROMPTS = [f"Q: {a} + {b}" for a in range(2, 8) for b in (11, 25)]
PAIR: dict[str, Any] = {"rule": "threshold", "param": 0.4}
TOKENS = 24
CELL = 8
# The plain process draws in the workers' cells too, for equal work.
SEARCH: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": [], "batch_size": CELL}
METHODS: dict[str, dict[str, Any]] = {
    "AISP": {"n": 32, "iterations": 4, "sigma": 0.5, "coherence": 0.5, **SEARCH},
    "best-of-n": {"n": 64, "group": 32, **SEARCH},
}


def load_pair() -> Any:
    """The shipped pair as a decoder."""
    from tta_ext import KnapsackDeferral
    from tta_ext.demo.pair import ASSETS

    return KnapsackDeferral.from_pretrained(str(ASSETS / "base"), str(ASSETS / "proxy"), **PAIR)


def load_search() -> tuple[Any, Any]:
    """The shipped base as a model, and a reward."""
    from tta_ext.decoding.rewards import parse_reward
    from tta_ext.decoding.runtime.loading import load_model
    from tta_ext.demo.pair import ASSETS

    return load_model(str(ASSETS / "base")), parse_reward("letter:s")


def worker_pids(root: int | None = None) -> list[int]:
    """Ray workers of this package below a process that started its Ray itself."""
    import psutil

    found = []
    try:
        below = psutil.Process(root).children(recursive=True)
    except psutil.Error:
        return []
    for process in below:
        try:
            if any("_Worker" in part for part in process.cmdline()[:1]):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def with_kills(run: Callable[[], Any], count: int, within: float, rng: random.Random) -> Any:
    """A run's result while workers die at random moments; again until all have died in time.

    Returns:
        What ``run`` returned, and the seconds it took.
    """
    for _ in range(20):
        ended, killed = threading.Event(), list[int]()
        start = perf_counter()
        moments = sorted(start + rng.uniform(0.0, within) for _ in range(count))
        thread = threading.Thread(target=_kill, args=(moments, ended, killed, rng))
        thread.start()
        result = run()
        seconds = perf_counter() - start
        ended.set()
        thread.join()
        if len(killed) == count:
            return result, seconds
    raise RuntimeError("no worker died before a run ended")


def _kill(
    moments: list[float], ended: threading.Event, killed: list[int], rng: random.Random
) -> None:
    """Kill a worker at each moment, until the run has ended."""
    for moment in moments:
        sleep(max(0.0, moment - perf_counter()))
        pids = worker_pids()
        if pids and not ended.is_set():
            killed.append(rng.choice(pids))
            os.kill(killed[-1], signal.SIGKILL)


def timed(run: Callable[[], Any]) -> Any:
    """A result, and the seconds it took."""
    start = perf_counter()
    result = run()
    return result, perf_counter() - start


def in_turn(here: Callable[[], Any], there: Callable[[], Any], rounds: int = 7) -> Any:
    """What ``there`` returns, the median of its seconds, and of its ratio to ``here``."""
    times, ratios = [], []
    for _ in range(rounds):
        plain = timed(here)[1]
        result, seconds = timed(there)
        times.append(seconds)
        ratios.append(seconds / plain)
    return result, median(times), median(ratios)


def search_method(name: str, engine: Any = None) -> Any:
    """A method over the shipped base."""
    from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN
    from tta_ext.decoding.runtime.loading import load_tokenizer
    from tta_ext.demo.pair import ASSETS

    kind = AdaptiveImportanceSampling if name == "AISP" else BestOfN
    model, reward = load_search()
    given = {} if engine is None else {"engine": engine}
    return kind(model, reward, load_tokenizer(str(ASSETS / "base")), **METHODS[name], **given)


def same(here: Any, there: Any) -> tuple[int, int, bool]:
    """Rollouts with the same tokens, all of them, and whether rewards and u have the same bits."""
    ours, theirs = ([one for row in r.candidates for one in row] for r in (here, there))
    equal = sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))
    bits = here.rewards == there.rewards and here.texts == there.texts
    if here.mean is not None:
        bits = bits and torch.equal(here.mean, there.mean)
    return equal, len(ours), bits


class Table:
    """The runs, told as they come, and whether all were equal.

    Args:
        counts: of workers.
        kills: workers that die in a run with kills.
        rng: says when, and which.
    """

    def __init__(self, counts: list[int], kills: int, rng: random.Random) -> None:
        self.counts, self.kills, self.rng, self.right = counts, kills, rng, True
        self.rows: list[tuple[str, ...]] = []

    def line(self, name: str, workers: Any, killed: Any, found: Any, *numbers: float) -> None:
        """One run: ``found`` is (equal, of how many, whether all bits are)."""
        equal, of, bits = found
        self.right = self.right and equal == of and bits
        same = "yes" if bits else "NO"
        figures = [f"{one:.2f}" for one in numbers]
        self.rows.append((name, str(workers), str(killed), f"{equal} of {of}", same, *figures))
        print(*self.rows[-1], flush=True)

    def runs(
        self,
        name: str,
        here: Callable[[], Any],
        there: Callable[[int], AbstractContextManager[Callable[[], Any]]],
        judge: Callable[[Any, Any], tuple[int, int, bool]],
    ) -> None:
        """The plain process, then each number of workers, without and with kills."""
        here()
        expected, plain = timed(here)
        self.line(name, "plain", "-", judge(expected, expected), plain)
        for count in self.counts:
            with there(count) as run:
                run()
                result, *numbers = in_turn(here, run) if count == 1 else timed(run)
                self.line(name, count, "-", judge(result, expected), *numbers)
                result, seconds = with_kills(run, self.kills, plain, self.rng)
                self.line(name, count, self.kills, judge(result, expected), seconds)


def kad(table: Table, seed: int) -> None:
    """Prompts by workers."""
    from tta_ext.engines.ray import Workers
    from tta_ext.engines.ray.prompts import Answers

    options = {"seed": seed, "max_new_tokens": TOKENS, "eos_token_id": []}
    jobs = [(options, list(range(at, at + 2))) for at in range(0, len(PROMPTS), 2)]
    pair = Answers(load_pair, PROMPTS)

    @contextmanager
    def there(count: int) -> Iterator[Callable[[], Any]]:
        with Workers(lambda: Answers(load_pair, PROMPTS), count, threads=1) as crew:

            def run() -> list[Any]:
                done = list(crew.map(jobs))
                return [r for _, _, rs in sorted(done, key=lambda one: one[1]) for r in rs]

            yield run

    def judge(found: list[Any], expected: list[Any]) -> tuple[int, int, bool]:
        return sum(map(eq, found, expected)), len(expected), found == expected

    table.runs("KAD", lambda: [r for job in jobs for r in pair.decode(*job)], there, judge)


def search(table: Table, name: str, seed: int) -> None:
    """Rollouts by workers."""
    from tta_ext.engines.ray import Rollouts

    method = search_method(name)

    @contextmanager
    def there(count: int) -> Iterator[Callable[[], Any]]:
        with Rollouts(count, load=load_search, cell=CELL) as engine:
            sharded = search_method(name, engine)
            yield lambda: sharded.generate(PROMPTS[0], seed=seed)

    table.runs(name, lambda: method.generate(PROMPTS[0], seed=seed), there, same)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--kills", type=int, default=1, help="workers that die in a run of kills")
    parser.add_argument("--seed", type=int, default=0, help="of answers and of kills")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    check_files(args.output)
    counts = [int(text) for text in args.workers.split(",")]

    from tta_ext.engines.ray.workers import ray

    torch.set_num_threads(1)
    # Workers share the cores there are; Ray must think that each has one.
    ray.init(
        include_dashboard=False, num_cpus=max(counts), object_store_memory=150_000_000,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    before = " ".join(f"{one:.2f}" for one in os.getloadavg())
    table = Table(counts, args.kills, random.Random(args.seed))
    kad(table, args.seed)
    for name in METHODS:
        search(table, name, args.seed)
    ray.shutdown()
    columns = ("method", "workers", "killed", "equal", "bits", "seconds", "ratio to plain")
    body = f"Load average before the first run: {before}.\n\n" + markdown(columns, table.rows)
    report(["python -m benchmarks.bench_ray", *sys.argv[1:]], body, args.output)
    if not table.right:
        sys.exit("answers differ")


if __name__ == "__main__":
    main()

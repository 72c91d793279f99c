"""Searches on vLLM: it draws the rollouts, with the noise added before its head.

Offline only, since the noise's mean goes to the workers by ``LLM.collective_rpc``. Tokens alone
come back: the sums u . eps are a function of u, seed, indices and length, and are made here. Caches
depend on tokens and not on noise, so prompts stay in vLLM's prefix cache from one iteration to the
next, and every worker of tensor parallelism adds the same noise, keyed by its indices.

    llm = LLM(MODEL, **LLM_OPTIONS, ...)
    aisp = AdaptiveImportanceSampling(model, reward, tokenizer, engine=VLLMEngine.on(llm))

The transformers model that a search takes is asked for sizes and, where sigma has a unit, for the
scale of its pre-logits; its rollouts are vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from tta_ext import ops
from tta_ext.decoding.search.engine import OnFinish, RolloutBatch, RolloutJob, RolloutTask
from tta_ext.decoding.search.sampling import Noise, restrict

__all__ = ["LLM_OPTIONS", "NoiseWorker", "Rollouts", "VLLMEngine"]

# What a search asks of the engine, besides a model.
LLM_OPTIONS: dict[str, Any] = {
    "logits_processors": ["tta_ext.engines.vllm.aisp:Rollouts"],
    "worker_extension_cls": "tta_ext.engines.vllm.aisp.NoiseWorker",
    "async_scheduling": False,
}
_CELL = "tta_cell"


class _Batch:
    """The rollouts of a worker's current step, and the job's noise and sampling."""

    def __init__(self) -> None:
        # Row: (prompt, sequence id, rollout, prompt's length, the answer so far).
        self.rows: dict[int, tuple[int, int, int, int, Sequence[int]]] = {}
        self.job: dict[str, Any] = {}

    def columns(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Rows that are rollouts, and their prompt, sequence id, rollout, position and step."""
        numbers = sorted(self.rows)
        found = [self.rows[number] for number in numbers]
        values = [(p, s, r, n + len(out), len(out)) for p, s, r, n, out in found]
        table = torch.tensor(values, dtype=torch.int64, device=device).T.contiguous()
        return torch.tensor(numbers, device=device), list(table)

    def perturb(self, hidden: Tensor) -> Tensor:
        """Pre-logits with each rollout's noise of its step."""
        noise = self.job.get("noise")
        if noise is None or not self.rows or len(hidden) <= max(self.rows):
            return hidden  # no search, or not the rows of a step (prompt logprobs, a dry run)
        index, (prompt, sequence, rollout, _, step) = self.columns(hidden.device)
        mean = noise["mean"]
        if mean.device != hidden.device:
            mean = noise["mean"] = mean.to(hidden.device)
        changed = add_noise(
            hidden.index_select(0, index),
            Noise(mean, noise["sigma"], noise["common"]),
            step=step,
            prompt=prompt,
            sequence=sequence,
            rollout=rollout,
            iteration=self.job["iteration"],
            seed=self.job["seed"],
        )
        return hidden.index_copy(0, index, changed)

    def draw(self, logits: Tensor) -> None:
        """Draw each rollout's token and leave its row no other choice."""
        if not self.rows:
            return
        job = self.job
        index, (_, sequence, rollout, position, _) = self.columns(logits.device)
        mine = logits.index_select(0, index)
        mine[:, job["size"] :] = -torch.inf
        if job["masked"]:
            mine[:, job["masked"]] = -torch.inf
        sample = job["decoding"] != "greedy"
        if sample:
            mine = restrict(mine, job["temperature"], job["top_k"], job["top_p"])
        keys: dict[str, Any] = {}
        if sample:
            keys = {
                "temperature": job["temperature"],
                "seed": job["seed"],
                "position": position,
                "sequence": sequence,
                "iteration": job["iteration"],
                "rollout": rollout,
            }
        token = ops.categorical_sample(mine, do_sample=sample, check=True, **keys)
        chosen = torch.full_like(mine, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)
        logits.index_copy_(0, index, chosen)


def add_noise(
    hidden: Tensor,
    noise: Noise,
    *,
    step: Tensor,
    prompt: Tensor,
    sequence: Tensor,
    rollout: Tensor,
    iteration: int,
    seed: int,
    dots: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pre-logits ``[N, d]`` with the noise that :mod:`~tta_ext.decoding.search.rollouts` adds.

    Args:
        step: int64 ``[N]``, tokens that each rollout has; past tau nothing is added.
        dots: float32 ``[N]`` each, to which the steps' own u . eps and, at a rollout's first step,
            that of the common part are added.
    """
    add = partial(
        ops.prelogit_perturb,
        mean=noise.mean,
        row=prompt,
        sequence=sequence,
        rollout=rollout,
        iteration=iteration,
        seed=seed,
    )
    own, shared = (None, None) if dots is None else dots
    if noise.common == 0.0:
        return add(hidden, step=step, sigma=noise.sigma, dot=own)
    tau = noise.mean.shape[1] - 1
    both = add(hidden.float(), step=0, sigma=noise.common, dot=_first(shared, step))
    both = add(both, step=step + 1, sigma=noise.sigma, dot=own).to(hidden.dtype)
    return torch.where((step < tau).unsqueeze(1), both, hidden)


def _first(dot: Tensor | None, step: Tensor) -> Tensor | None:
    """The common part counts once, at the first step."""
    return dot if dot is not None and not bool(step.any()) else None


_batch = _Batch()


class Rollouts(LogitsProcessor):
    """Draws the rollouts' tokens in the worker."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool = False
    ) -> None:
        _batch.rows.clear()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        rows = _batch.rows
        for number in batch_update.removed:
            rows.pop(number, None)
        for number, params, prompt, output in batch_update.added:
            rows.pop(number, None)
            cell = (params.extra_args or {}).get(_CELL)
            if cell is not None:
                rows[number] = (*cell, len(prompt or ()), output)
        for origin, target, direction in batch_update.moved:
            moved, other = rows.pop(origin, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if direction is MoveDirectionality.SWAP and other is not None:
                rows[origin] = other

    def apply(self, logits: Tensor) -> Tensor:
        _batch.draw(logits)
        return logits


class NoiseWorker:
    """What ``collective_rpc`` calls in each worker."""

    model_runner: Any

    def tta_job(self, job: Mapping[str, Any]) -> int:
        """Take over a job's noise and sampling; the size of the pre-logits."""
        model = self.model_runner.model
        if not getattr(model, "tta_perturbed", False):
            inner: Callable[[Tensor], Any] = model.compute_logits
            model.compute_logits = lambda hidden: inner(_batch.perturb(hidden))
            model.tta_perturbed = True
        _batch.job = dict(job)
        if job["noise"] is not None:
            noise = dict(job["noise"])
            flat = torch.frombuffer(bytearray(noise["mean"]), dtype=torch.float32)
            _batch.job["noise"] = noise | {"mean": flat.reshape(noise.pop("shape"))}
        size: int = self.model_runner.model_config.get_hidden_size()
        return size


class VLLMEngine:
    """Draws a search's rollouts on vLLM.

    Args:
        llm: made with :data:`LLM_OPTIONS`.
        task: what to draw.

    Attributes:
        seconds: time inside vLLM so far.

    Raises:
        ValueError: a task's stop strings without vLLM's tokenizer.
    """

    def __init__(self, llm: LLM, task: RolloutTask) -> None:
        self.llm, self.task = llm, task
        self.device = torch.device("cpu")
        self.seconds = 0.0
        self.dimensions = self._send(None, 0)

    @classmethod
    def on(cls, llm: LLM) -> Callable[[Any, RolloutTask], VLLMEngine]:
        """What a search's ``engine`` argument takes."""
        return lambda model, task: cls(llm, task)

    def _send(self, noise: Noise | None, iteration: int) -> int:
        task, sampling = self.task, self.task.sampling
        job: dict[str, Any] = {
            "iteration": iteration,
            "seed": task.seed,
            "size": task.vocabulary.size,
            "masked": list(task.vocabulary.masked),
            "noise": None,
        }
        for name in ("decoding", "temperature", "top_k", "top_p"):
            job[name] = getattr(sampling, name)
        if noise is not None:
            # Bytes, since the engine's messages to another process hold no tensors.
            job["noise"] = {
                "mean": noise.mean.cpu().contiguous().numpy().tobytes(),
                "shape": list(noise.mean.shape),
                "sigma": noise.sigma,
                "common": noise.common,
            }
        return int(self.llm.collective_rpc("tta_job", args=(job,))[0])

    def roll(self, job: RolloutJob, on_finish: OnFinish) -> RolloutBatch:
        start, task = perf_counter(), self.task
        self._send(job.noise, job.iteration)
        params = [self._params(prompt, rollout) for prompt, rollout in job.cells]
        inputs: list[Any] = [
            {"prompt_token_ids": list(task.prompts[prompt])} for prompt, _ in job.cells
        ]
        found = self.llm.generate(inputs, params, use_tqdm=False)
        self.seconds += perf_counter() - start
        batch = RolloutBatch()
        for i, one in enumerate(found):
            (answer,) = one.outputs
            tokens = list(answer.token_ids)
            batch.tokens.append(tokens)
            batch.finish.append(self._why(tokens))
            on_finish(i, tokens)
        if job.noise is not None:
            batch.dot, batch.common_dot = self._dots(job, job.noise, batch.tokens)
        return batch

    def _params(self, prompt: int, rollout: int) -> SamplingParams:
        sampling = self.task.sampling
        stop = None if sampling.stop is None else list(sampling.stop.strings)
        return SamplingParams(
            temperature=0.0,
            max_tokens=sampling.max_new_tokens,
            stop=stop,
            stop_token_ids=sorted(sampling.ends),
            ignore_eos=True,  # the ends of the task are all that count
            detokenize=stop is not None,
            extra_args={_CELL: [prompt, self.task.sequence[prompt], rollout]},
        )

    def _why(self, tokens: Sequence[int]) -> str:
        sampling = self.task.sampling
        if tokens and tokens[-1] in sampling.ends:
            return "eos"
        if sampling.stop is not None and sampling.stop(tokens):
            return "stop"
        return "length"

    def _dots(
        self, job: RolloutJob, noise: Noise, tokens: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Sums of u . eps over each rollout's steps, as the loop of this process adds them up."""
        count = len(job.cells)
        own, common = torch.zeros(count), torch.zeros(count)
        lengths = [len(one) for one in tokens]
        tau = noise.mean.shape[1] - (noise.common > 0.0)
        for step in range(min(tau, max(lengths, default=0))):
            rows = [i for i, length in enumerate(lengths) if length > step]
            index = torch.tensor(rows)
            prompt = torch.tensor([job.cells[i][0] for i in rows])
            mine, shared = own.index_select(0, index), common.index_select(0, index)
            add_noise(
                torch.zeros(len(rows), self.dimensions),
                noise,
                step=torch.full_like(index, step),
                prompt=prompt,
                sequence=torch.tensor([self.task.sequence[job.cells[i][0]] for i in rows]),
                rollout=torch.tensor([job.cells[i][1] for i in rows]),
                iteration=job.iteration,
                seed=self.task.seed,
                dots=(mine, shared),
            )
            own.index_copy_(0, index, mine)
            common.index_copy_(0, index, shared)
        return own, common

"""Lists of prompts answered by a pair in vLLM, in this process: ``tta generate --backend vllm``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from tta_ext._version import install
from tta_ext.decoding.deferral.result import DecodeStats, Generation
from tta_ext.decoding.runtime.loading import load_tokenizer
from tta_ext.decoding.runtime.prompts import encode_prompts
from tta_ext.engines.rows import source
from tta_ext.engines.vllm.arguments import PROCESSED
from tta_ext.engines.vllm.pair import PROCESSOR
from tta_ext.rules import Rule

__all__ = ["Asking", "OfflinePair"]


class Asking(NamedTuple):
    """One answer: the prompt's ids, the sequence id, vLLM's ``SamplingParams``."""

    ids: list[int]
    sequence: int
    params: Any


class OfflinePair:
    """A vLLM engine over a pair, with ``generate``; prompts go in together, vLLM batches them.

    Both models read the same ids, those of the folder's tokenizer and chat template.

    Args:
        pair: the folder that ``tta vllm-pair`` wrote.
        rule: of all answers, with its temperatures.
        engine: options of ``vllm.LLM``, such as ``tensor_parallel_size``.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, pair: str | Path, rule: Rule, **engine: Any) -> None:
        # The runner whose processors draw our tokens; its log would stand between the answers.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ModuleNotFoundError:
            raise ImportError(f"backend vllm needs vLLM: {install('vllm')}") from None
        self.rule, self.tokenizer = rule, load_tokenizer(str(pair))
        self.llm = LLM(str(pair), logits_processors=[PROCESSOR], logprobs_mode=PROCESSED, **engine)

    def request(
        self,
        prompts: Sequence[Any],
        *,
        seed: int,
        sequence: Sequence[int] | None = None,
        do_sample: bool = True,
        max_new_tokens: int = 256,
        num_return_sequences: int = 1,
        stop_strings: Sequence[str] | None = None,
    ) -> list[Asking]:
        """What vLLM is asked, for each answer.

        Args:
            prompts: texts, conversations, token ids.
            seed, sequence: of the random streams, an id for each answer; 0, 1, ... without.
            do_sample: False takes the mixture's most probable token.
            max_new_tokens: of each answer at most.
            num_return_sequences: answers to each prompt.
            stop_strings: strings that end an answer.

        Raises:
            ValueError: a prompt that has no tokens, or that does not fit the engine's
                ``max_model_len`` with ``max_new_tokens`` behind it; a temperature with greedy.
        """
        from vllm import SamplingParams

        if not do_sample and self.rule.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.rule.temperature}, expected 1: vLLM has none for greedy "
                "requests"
            )
        encoded = encode_prompts(prompts, self.tokenizer)
        limit = self.llm.llm_engine.model_config.max_model_len
        for row, ids in enumerate(encoded):
            if len(ids) + max_new_tokens > limit:  # vLLM would cut the answer short
                raise ValueError(
                    f"prompt {row} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, "
                    f"but vLLM's max_model_len is {limit}"
                )
        rows = [ids for ids in encoded for _ in range(num_return_sequences)]
        rule, temperature = self.rule, self.rule.temperature if do_sample else 0.0
        about = {
            "tta_rule": rule.name,
            "tta_param": rule.param,
            "tta_critical": rule.critical,
            "tta_rule_temperature": rule.rule_temperature,
            "tta_seed": seed,
        }
        numbers = range(len(rows)) if sequence is None else sequence
        return [
            Asking(
                ids,
                number,
                SamplingParams(
                    temperature=temperature,
                    max_tokens=max_new_tokens,
                    logprobs=0,
                    stop=list(stop_strings or ()),
                    extra_args={**about, "tta_sequence": number},
                ),
            )
            for ids, number in zip(rows, numbers, strict=True)
        ]

    def generate(self, prompts: Sequence[Any], *, seed: int, **options: Any) -> Generation:
        """Answers to prompts: the tokens of :meth:`tta_ext.KnapsackDeferral.generate`.

        Args:
            prompts, seed, options: of :meth:`request`.
        """
        start = perf_counter()
        asked = self.request(prompts, seed=seed, **options)
        given: Any = [{"prompt_token_ids": one.ids} for one in asked]
        outputs = self.llm.generate(given, [one.params for one in asked], use_tqdm=False)
        found = [one.outputs[0] for one in outputs]
        tokens = [list(one.token_ids) for one in found]
        deferred = [
            [source(step[token].logprob).deferred for step, token in zip(steps, ids, strict=True)]
            for steps, ids in ((one.logprobs, ids) for one, ids in zip(found, tokens, strict=True))
        ]
        return Generation(
            tokens=tokens,
            deferred=deferred,
            finish=[_finish(one) for one in found],
            prompt_tokens=[one.ids for one in asked],
            texts=[one.text for one in found],
            sequence=[one.sequence for one in asked],
            seed=seed,
            stats=DecodeStats(
                tokens=sum(map(len, tokens)),
                deferred_tokens=sum(map(sum, deferred)),
                seconds=perf_counter() - start,
                runners={"pair": "vllm"},
            ),
        )


def _finish(output: Any) -> str:
    """Why an answer ended, in our words: vLLM says "stop" also of end-of-sequence."""
    ended_by_text = isinstance(output.stop_reason, str)
    return "eos" if output.finish_reason == "stop" and not ended_by_text else output.finish_reason

"""Deferral and search as models of EleutherAI's lm-evaluation-harness (``tta-ext[lm-eval]``).

``python -m tta_ext.lm_eval`` is the harness's own command with three models more::

    python -m tta_ext.lm_eval run --tasks gsm8k,arc_challenge --device cuda --batch_size 16 \\
        --model tta_kad --model_args pretrained=BASE,proxy=PROXY,rule=threshold,param=0.4

Answers are drawn under the sequence id ``64 * document + repeat``, so scores depend neither on
batches nor on ``--limit``. Tasks that compare log-likelihoods (multiple choice) score the mixture
itself: what they see is log pi.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.deferral.implicit_reward import ImplicitReward
from tta_ext.decoding.rewards import parse_reward
from tta_ext.decoding.runtime.loading import load_model, load_tokenizer
from tta_ext.decoding.runtime.models import position_limit
from tta_ext.decoding.search.compare import method_class
from tta_ext.rules import IMPLICIT_REWARD, Rule

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(
        f"tta_ext.lm_eval needs lm-evaluation-harness ({error}); pip install 'tta-ext[lm-eval]'"
    ) from None

__all__ = ["REPEATS", "ImplicitRewardLM", "KnapsackDeferralLM", "SearchLM", "stream_ids"]

# Answers to a document that have a sequence id of their own.
REPEATS = 64


def stream_ids(requests: Iterable[Any]) -> list[int]:
    """A sequence id for each request: ``64 * doc_id + idx``, one more for each repeat.

    Raises:
        ValueError: more than 64 answers to a document.
    """
    ids, seen = [], Counter[tuple[Any, int, int]]()
    for one in requests:
        key = one.task_name, one.doc_id, one.idx
        number = one.idx + seen[key]
        seen[key] += 1
        if number >= REPEATS:
            raise ValueError(
                f"document {one.doc_id} of {one.task_name} is asked {number + 1} times, expected "
                f"at most {REPEATS} (repeats in the task's file)"
            )
        ids.append(REPEATS * one.doc_id + number)
    return ids


class _Answering(HFLM):
    """A model of the harness whose answers come from one of our loops.

    Args:
        seed: seed of sampled answers.
        options: HFLM's.
    """

    # What a task's generation_kwargs may hold besides until, max_gen_toks, do_sample, temperature.
    also: frozenset[str] = frozenset()

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if self.backend != "causal":
            raise ValueError(f"{self.config.model_type} is no causal language model")
        self.seed = seed

    @abstractmethod
    def answer(
        self, prompts: list[list[int]], sequence: list[int], options: dict[str, Any]
    ) -> list[list[int]]:
        """Token ids of answers; options are do_sample and those of our loops."""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        sequence, texts = stream_ids(requests), [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, one in enumerate(requests):
            groups.setdefault(repr(one.args[1]), []).append(place)
        for places in groups.values():
            given = requests[places[0]].args[1]
            options, until, room = self._options(given)
            prompts = {
                i: self.tok_encode(requests[i].args[0], left_truncate_len=room) for i in places
            }
            # Longest first, as the harness does: what does not fit in memory fails at once.
            places.sort(key=lambda i: -len(prompts[i]))
            for first in range(0, len(places), size):
                batch = places[first : first + size]
                answers = self.answer(
                    [prompts[i] for i in batch], [sequence[i] for i in batch], options
                )
                for i, tokens in zip(batch, answers, strict=True):
                    texts[i] = self._text(tokens, until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _options(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
        """Options of our loops, stop strings, and tokens that a prompt may have."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until = kwargs.pop("until", None) or []
        until = [until] if isinstance(until, str) else [term for term in until if term]
        length = kwargs.pop("max_gen_toks")
        options = {
            "max_new_tokens": length,
            "do_sample": kwargs.pop("do_sample"),
            "temperature": kwargs.pop("temperature", 0.0) or 1.0,
            "stop_strings": until or None,
            "seed": self.seed,
        }
        options |= {name: kwargs.pop(name) for name in self.also & kwargs.keys()}
        if kwargs:
            known = ["do_sample", "max_gen_toks", "temperature", "until", *self.also]
            raise ValueError(
                f"generation_kwargs has {min(kwargs)!r}, expected some of {', '.join(known)}"
            )
        room = self.max_length - length
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {length}, expected less than the {self.max_length} positions of "
                "the models"
            )
        return options, until, room

    def _text(self, tokens: list[int], until: list[str]) -> str:
        """An answer as the harness wants it: without thoughts, stop strings and special tokens."""
        end = self.think_end_token
        if isinstance(end, int) and end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
            return self._text(tokens, until).lstrip()
        return postprocess_generated_text(
            self.tok_decode(tokens), until, end if isinstance(end, str) else None
        )


class _Mixing(_Answering):
    """Two models or three, decoded by :class:`KnapsackDeferral`."""

    def __init__(
        self,
        *,
        proxy: Any,
        anti: Any = None,
        seed: int = 0,
        options: dict[str, Any],
        **hf: Any,
    ) -> None:
        super().__init__(seed=seed, **hf)
        place = {"dtype": hf.get("dtype", "auto"), "device": self.device}
        own = load_tokenizer(proxy) if isinstance(proxy, str) else self.tokenizer
        proxy, anti = (load_model(m, **place) if isinstance(m, str) else m for m in (proxy, anti))
        if not self.tokenizer.chat_template:
            # A base model rarely has one; both models read the aligned one's.
            self.tokenizer.chat_template = own.chat_template
        self.mixture = KnapsackDeferral(
            self.model, proxy, self.tokenizer, proxy_tokenizer=own, anti=anti, **options
        )

    @property
    def max_length(self) -> int:
        """Positions of the model that has the fewest."""
        others = [position_limit(m) for m in (*self.mixture.proxies, *self.mixture.anti)]
        return min([super().max_length, *(limit for limit in others if limit)])

    def answer(
        self, prompts: list[list[int]], sequence: list[int], options: dict[str, Any]
    ) -> list[list[int]]:
        return self.mixture.generate(prompts, sequence=sequence, **options).tokens

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Log pi of each row's next tokens, float32 ``[rows, columns, V]``."""
        assert attn_mask is None and labels is None  # for encoder-decoder models
        mixture = self.mixture
        call, vocabulary = super()._model_call, mixture.vocabulary
        masked = torch.tensor(vocabulary.masked, dtype=torch.int64, device=inps.device)

        def cut(logits: Tensor) -> Tensor:
            return logits[..., : vocabulary.size].index_fill(-1, masked, -torch.inf)

        def other(model: Any) -> Tensor:
            with torch.no_grad():
                return cut(model(inps).logits)

        base = cut(call(inps))
        proxies, anti = ([other(m) for m in models] for models in (mixture.proxies, mixture.anti))
        rows = [
            self._law(base[row], [q[row] for q in proxies], [q[row] for q in anti])
            for row in range(len(base))
        ]
        return torch.stack(rows).log_()

    @abstractmethod
    def _law(self, base: Tensor, proxies: list[Tensor], anti: list[Tensor]) -> Tensor:
        """Pi from logits ``[columns, V]``."""


@register_model("tta_kad")
class KnapsackDeferralLM(_Mixing):
    """A base that defers to a proxy.

    Args:
        proxy: folder or hub name of the aligned model, or the model.
        rule, param, critical, rule_temperature, speculative: as for
            :class:`tta_ext.KnapsackDeferral`.
        seed: seed of sampled answers.
        options: HFLM's, with ``pretrained`` for the base.
    """

    def __init__(
        self,
        *,
        proxy: Any,
        rule: str = "threshold",
        param: float | None = 0.4,
        critical: str = "exclude",
        rule_temperature: float | None = None,
        speculative: int | str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        chosen = {
            "rule": rule,
            "param": param,
            "critical": critical,
            "rule_temperature": rule_temperature,
            "speculative": speculative,
        }
        super().__init__(proxy=proxy, seed=seed, options=chosen, **options)

    def _law(self, base: Tensor, proxies: list[Tensor], anti: list[Tensor]) -> Tensor:
        assert isinstance(self.mixture.rule, Rule)
        return ops.deferral_probs(base, proxies[0], rule=self.mixture.rule)


@register_model("tta_implicit_reward")
class ImplicitRewardLM(_Mixing):
    """A base tilted by what alignment has changed in a small expert.

    Args:
        proxy: folder or hub name of the expert, or the model.
        anti: the expert before alignment, likewise; None tilts by the expert alone.
        beta: weight of the expert.
        seed: seed of sampled answers.
        options: HFLM's, with ``pretrained`` for the base.
    """

    def __init__(
        self, *, proxy: Any, anti: Any = None, beta: float = 1.0, seed: int = 0, **options: Any
    ) -> None:
        chosen = {"rule": IMPLICIT_REWARD, "param": float(beta)}
        super().__init__(proxy=proxy, anti=anti, seed=seed, options=chosen, **options)

    def _law(self, base: Tensor, proxies: list[Tensor], anti: list[Tensor]) -> Tensor:
        assert isinstance(self.mixture.rule, ImplicitReward)
        stacked = torch.stack(anti) if anti else None
        return ops.implicit_reward_probs(
            base, torch.stack(proxies), stacked, self.mixture.rule.param
        )


@register_model("tta_search")
class SearchLM(_Answering):
    """A model that searches for a high reward.

    Args:
        reward: as ``tta search --reward`` takes it, or a function.
        method: ``aisp``, ``best_of_n``, ``args`` or ``chunk_beam``.
        seed: seed of the search.
        options: settings of the method (``n``, ``iterations``, ...); all others are HFLM's.
    """

    also = frozenset({"top_k", "top_p"})

    def __init__(self, *, reward: Any, method: str = "aisp", seed: int = 0, **options: Any) -> None:
        kind = method_class(method)
        # Both have a batch size; on this command line it is the harness's.
        names = {one.name for one in fields(kind.settings_type)} - {"batch_size"}
        settings = {name: options.pop(name) for name in names & options.keys()}
        super().__init__(seed=seed, **options)
        reward = parse_reward(reward) if isinstance(reward, str) else reward
        self.search = kind(self.model, reward, self.tokenizer, **settings)

    def answer(
        self, prompts: list[list[int]], sequence: list[int], options: dict[str, Any]
    ) -> list[list[int]]:
        settings = options | {"decoding": "sample" if options["do_sample"] else "greedy"}
        del settings["do_sample"]
        return [
            one.tokens for one in self.search.generate(prompts, sequence=sequence, **settings).best
        ]

    def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(
            "tta_search answers prompts; it has no law of tokens for tasks of log-likelihoods"
        )


def main() -> None:
    """The harness's command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

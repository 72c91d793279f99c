"""Rewards: functions from prompts and answers to numbers.

A reward is any callable ``reward(prompts, responses) -> floats``: two lists of equal length, the
prompts as they were given to the method (strings, conversations or token ids) and the answers as
text (token ids if the method has no tokenizer), and one number for each answer, higher is better.
-inf is legal and rules an answer out; NaN and +inf are errors. A search calls it with many answers
at once, in one call an iteration or, with ``reward_batch_size``, as soon as so many have finished.

Writing one takes three lines::

    def brevity(prompts, responses):
        return [-float(len(response.split())) for response in responses]

This module has adapters for reward models, a lexicon for sentiment, and verifiable rewards for
demonstrations.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice
from numbers import Complex, Real
from time import perf_counter
from typing import Any, TypeAlias

import torch

from tta_ext._version import install
from tta_ext.decoding.classifier import ClassifierReward
from tta_ext.decoding.embedding import EmbeddingReward

__all__ = [
    "ClassifierReward",
    "DiversityReward",
    "EmbeddingReward",
    "JsonReward",
    "LengthReward",
    "LetterReward",
    "Reward",
    "RewardStream",
    "SentimentReward",
    "WeightedReward",
    "call_reward",
    "check_reward",
    "parse_reward",
]

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


# Prompts and responses in, a number for each response out.
Reward: TypeAlias = "Callable[[list[Any], list[Any]], Sequence[float] | torch.Tensor]"


def check_reward(reward: Any) -> None:
    """``TypeError`` unless a reward can be called."""
    if not callable(reward):
        raise TypeError(
            f"reward is {type(reward).__name__}, expected a callable (prompts, responses) -> floats"
        )


def call_reward(reward: Reward, prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    """Call a reward and check its answer: the one place that does.

    The reward may differentiate: it runs outside of the inference mode that searches run in. Finite
    values that no float can hold become the nearest one.

    Args:
        reward: the reward.
        prompts, responses: as many prompts as answers; texts, or token ids without a tokenizer.

    Returns:
        A float for each response, finite or -inf.

    Raises:
        TypeError: it returned something that is no sequence of numbers: text, a mapping, a set.
        ValueError: it returned another number of values, NaN or +inf.
        Exception: what it raised itself, as it is.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values: Any = reward(list(prompts), list(responses))
    if isinstance(values, torch.Tensor):
        if values.is_meta or values.layout is not torch.strided:
            raise TypeError("the reward returned a sparse or meta tensor, expected plain numbers")
        values = values.detach().cpu()
    shape = getattr(values, "shape", (0,))
    if math.prod(shape[1:]) > 1:
        raise TypeError(
            f"the reward returned values of shape {list(shape)}, expected [{len(responses)}]"
        )
    if len(shape) > 1:
        values = values.reshape(-1)
    other = isinstance(values, (Mapping, Set, str, bytes, bytearray, memoryview))
    if other or shape == () or not isinstance(values, Iterable):
        raise TypeError(
            f"the reward returned {type(values).__name__}, expected a number for each response"
        )
    found = [_number(value) for value in values]
    if len(found) != len(responses):
        raise ValueError(f"the reward returned {len(found)} values for {len(responses)} responses")
    for value, response in zip(found, responses, strict=True):
        if math.isnan(value) or value == math.inf:
            raise ValueError(
                f"the reward of {str(response)[:60]!r} is {value}, expected a finite number or -inf"
            )
    return found


def _number(value: Any) -> float:
    """One value of a reward."""
    imaginary = isinstance(value, Complex) and not isinstance(value, Real)
    if not imaginary and not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except OverflowError:
            return sys.float_info.max if value > 0 else -sys.float_info.max
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            pass
    raise TypeError(
        f"the reward returned a {type(value).__name__} among its values, expected a number for "
        "each response"
    )


class RewardStream:
    """Collects finished answers and asks the reward about them in batches.

    Args:
        reward: the reward.
        batch_size: ask as soon as so many answers wait; None: only at the end.

    Attributes:
        seconds, calls, items: time inside the reward, number of calls and of answers so far.
    """

    def __init__(self, reward: Reward, batch_size: int | None = None) -> None:
        check_reward(reward)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"reward_batch_size is {batch_size}, expected at least 1")
        self.reward, self.batch_size = reward, batch_size
        self.seconds, self.calls, self.items = 0.0, 0, 0
        self._waiting: list[tuple[Any, Any, Any]] = []
        self._known: dict[Any, float] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.reward!r}: {self.items} answers scored>"

    def put(self, key: Any, prompt: Any, response: Any) -> None:
        """Add a finished answer under a key."""
        self._waiting.append((key, prompt, response))
        if self.batch_size is not None and len(self._waiting) >= self.batch_size:
            self._ask()

    def take(self, rewards: Sequence[float], seconds: float, calls: int) -> None:
        """Add what the reward said elsewhere of answers 0, 1, ..., and what that cost."""
        self._known |= enumerate(rewards)
        self.seconds += seconds
        self.calls += calls
        self.items += len(rewards)

    def collect(self) -> dict[Any, float]:
        """Rewards of all answers put in since the last collection."""
        self._ask()
        known, self._known = self._known, {}
        return known

    def _ask(self) -> None:
        size = self.batch_size or max(len(self._waiting), 1)
        while self._waiting:
            part, self._waiting = self._waiting[:size], self._waiting[size:]
            keys, prompts, responses = zip(*part, strict=True)
            start = perf_counter()
            values = call_reward(self.reward, prompts, responses)
            self.seconds += perf_counter() - start
            self.calls += 1
            self.items += len(values)
            self._known.update(zip(keys, values, strict=True))


class SentimentReward:
    """Sentiment by the VADER lexicon: -1 (negative) to 1 (positive). Needs ``vaderSentiment``.

    Args:
        sign: -1 to reward negative answers.

    Source: Hutto and Gilbert, "VADER", ICWSM 2014.
    """

    def __init__(self, sign: float = 1.0) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError:
            raise ImportError(
                f"the sentiment reward needs vaderSentiment: {install('demo')}"
            ) from None
        self.sign = sign
        self._analyzer = SentimentIntensityAnalyzer()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sign={self.sign:g})"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [self.sign * self._analyzer.polarity_scores(text)["compound"] for text in responses]


class LetterReward:
    """Share of an answer's words that start with a letter, 0 to 1; 0 for an answer without words.

    Args:
        letter: the letter, either case.
        distinct: the number of different such words instead, so that neither saying one word over
            and over nor saying little earns anything.
    """

    def __init__(self, letter: str = "s", *, distinct: bool = False) -> None:
        if len(letter) != 1 or not letter.isalpha():
            raise ValueError(f"letter is {letter!r}, expected a single letter")
        self.letter, self.distinct = letter.casefold(), distinct

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.letter!r}, distinct={self.distinct})"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        rewards = []
        for text in responses:
            words = [word.casefold() for word in _WORD.findall(text)]
            hits = [word for word in words if word[0] == self.letter]
            if self.distinct:
                rewards.append(float(len(set(hits))))
            else:
                rewards.append(len(hits) / len(words) if words else 0.0)
        return rewards


class JsonReward:
    """Is the answer JSON? 1 if all of it is an object or array, 0.5 if a part is, 0 otherwise.

    Parts are sought at the first 32 brackets only, so that no answer takes long to judge.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [self._score(text) for text in responses]

    @staticmethod
    def _score(text: str) -> float:
        try:
            return 1.0 if isinstance(json.loads(text), (dict, list)) else 0.0
        except (ValueError, RecursionError):
            pass
        decoder = json.JSONDecoder()
        for match in islice(re.finditer(r"[{\[]", text), 32):
            try:
                decoder.raw_decode(text, match.start())
            except (ValueError, RecursionError):
                continue
            return 0.5
        return 0.0


class LengthReward:
    """Closeness to a number of words: ``-|words - target| / target``.

    Args:
        target: the number of words, at least 1.
    """

    def __init__(self, target: int = 20) -> None:
        if target < 1:
            raise ValueError(f"target is {target}, expected at least 1")
        self.target = target

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target})"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [-abs(len(_WORD.findall(text)) - self.target) / self.target for text in responses]


class DiversityReward:
    """How little an answer repeats itself, 0 to 1: less is a word or phrase over and over.

    The product over n = 2, 3, 4 of the share of n-grams of words that are different from each
    other; 1 for an answer too short to repeat one. Letters' case does not tell words apart.

    Source: Su et al., "A Contrastive Framework for Neural Text Generation", arXiv:2202.06417.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [self._score(_WORD.findall(text.casefold())) for text in responses]

    @staticmethod
    def _score(words: Sequence[str]) -> float:
        shares = 1.0
        for n in (2, 3, 4):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            shares *= len(set(grams)) / len(grams) if grams else 1.0
        return shares


class WeightedReward:
    """A weighted sum of rewards.

    Args:
        parts: (weight, reward) pairs.
    """

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        if not parts:
            raise ValueError("parts is empty, expected (weight, reward) pairs")
        self.parts = list(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parts!r})"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        total = [0.0] * len(responses)
        for weight, reward in self.parts:
            values = call_reward(reward, prompts, responses)
            total = [a + weight * b for a, b in zip(total, values, strict=True)]
        return total


def _named(text: str) -> Reward:
    module, _, name = text.partition(":")
    if not module or not name or module.startswith("."):
        raise ValueError(f"python:{text} names no function, expected python:MODULE:NAME")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another that is not
        raise ValueError(
            f"python:{text}: there is no module {module}, neither installed nor in the current "
            "folder"
        ) from error
    if not callable(found):
        raise ValueError(f"{module} has no function {name}")
    return found


def _classifier(text: str) -> Reward:
    path, _, label = text.partition("#")
    if not path:
        raise ValueError("classifier names no model, expected classifier:PATH")
    return ClassifierReward.from_pretrained(path, label=label or None)


def _embedding(text: str) -> Reward:
    path, hash_, wanted = text.partition("#")
    if not path:
        raise ValueError("embedding names no model, expected embedding:PATH or embedding:PATH#TEXT")
    return EmbeddingReward.from_pretrained(path, wanted if hash_ else None)


def _exactly(text: str, known: dict[str, Any]) -> Any:
    """What one of a few texts after a reward's name stands for."""
    try:
        return known[text]
    except KeyError:
        raise ValueError(
            f"after the reward's colon is {text!r}, expected {' or '.join(map(repr, known))}"
        ) from None


def _words(text: str) -> Reward:
    if text and not text.isdecimal():
        raise ValueError(f"words:{text} is not known, expected a number, such as words:20")
    return LengthReward(int(text or 20))


def _letter(text: str) -> Reward:
    letter, colon, rest = text.partition(":")
    if colon and rest != "distinct":
        raise ValueError(f"letter:{text} is not known, expected letter:s or letter:s:distinct")
    return LetterReward(letter or "s", distinct=bool(colon))


_SIGNS = {"": 1.0, "positive": 1.0, "negative": -1.0}
_KINDS: dict[str, Callable[[str], Reward]] = {
    "letter": _letter,
    "sentiment": lambda text: SentimentReward(_exactly(text, _SIGNS)),
    "json": lambda text: _exactly(text, {"": JsonReward})(),
    "words": _words,
    "diversity": lambda text: _exactly(text, {"": DiversityReward})(),
    "classifier": _classifier,
    "embedding": _embedding,
    "python": _named,
}


def parse_reward(text: str) -> Reward:
    """A reward from its name on the command line.

    Args:
        text: ``letter:s``, ``letter:s:distinct``, ``sentiment``, ``sentiment:negative``, ``json``,
            ``words:20``, ``diversity``, ``embedding:PATH`` (an encoder: closeness to the prompt) or
            ``embedding:PATH#TEXT`` (to a text), ``classifier:PATH`` or ``classifier:PATH#LABEL`` (a
            sequence-classification model), ``python:MODULE:NAME`` (any callable).

    Raises:
        ValueError: there is no such reward.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"reward is {text!r}, expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](rest)

"""Text of growing answers: pieces of it, and stop strings, for every kind of tokenizer."""

from __future__ import annotations

import json
import random
from functools import cache
from string import ascii_letters
from typing import Any

import pytest
import torch
import transformers
from models import make_tokenizer
from packaging.version import Version
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, WordPiece
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, StopStringCriteria

from tta_ext.decoding import BestOfN, KnapsackDeferral
from tta_ext.decoding.deferral.result import source_spans
from tta_ext.decoding.runtime.prompts import text_of
from tta_ext.decoding.runtime.stopping import StopStrings
from tta_ext.decoding.runtime.streaming import TextDeltas
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems

TEXT = (
    "Hello there, User: the quick brown fox.\n\nUser: one more, isn't it? ### End\n"
    "Ünïcödé tèxt 日本語のテスト 🙂👍🏽 x=1; y = [2, 3]\n" * 2
)
KINDS = ["byte-level", "sentencepiece", "metaspace", "wordpiece", "python"]


@cache
def tokenizer_of(kind: str) -> Any:
    if kind == "python":
        return ByT5Tokenizer(extra_ids=0)
    special = ["<unk>", "<end>"]
    if kind == "wordpiece":
        core = Tokenizer(WordPiece(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=special, show_progress=False
        )
    else:
        core = Tokenizer(BPE(unk_token="<unk>", byte_fallback=kind == "sentencepiece"))
        alphabet: list[str] = []
        if kind == "byte-level":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        elif kind == "metaspace":
            core.pre_tokenizer = pre_tokenizers.Metaspace()
            core.decoder = decoders.Metaspace()
        else:
            special += [f"<0x{byte:02X}>" for byte in range(256)]
            core.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            core.decoder = decoders.Sequence(
                [
                    decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            )  # fmt: skip
        trainer = trainers.BpeTrainer(
            vocab_size=len(special) + 400, special_tokens=special, initial_alphabet=alphabet,
            max_token_length=8, show_progress=False,
        )  # fmt: skip
    core.train_from_iterator([TEXT, ascii_letters], trainer)
    if kind == "sentencepiece":  # its bytes are no special tokens
        state = json.loads(core.to_str())
        state["added_tokens"] = state["added_tokens"][:2]
        core = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")


def answers(tokenizer: Any, count: int, seed: int, noise: bool = True) -> list[list[int]]:
    """Pieces of a text and, with noise, every third ids at random: broken characters and so on."""
    rng = random.Random(seed)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = []
    for i in range(count):
        start, size = rng.randrange(len(ids) - 2), rng.randint(2, 24)
        piece = ids[start : start + size]
        if noise and i % 3 == 0:
            piece = [rng.randrange(len(tokenizer)) for _ in range(size)]
        found.append(piece)
    return found


def pieces(deltas: TextDeltas, tokens: list[int]) -> list[str]:
    return [deltas.push(token, i == len(tokens) - 1) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for tokens in answers(tokenizer, 150, seed=0, noise=kind != "sentencepiece"):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces(TextDeltas(tokenizer), tokens)) == text


def test_nothing_is_cleaned_up() -> None:
    """As transformers would where a tokenizer says so: a stream cannot take back its spaces."""
    tokenizer = ByT5Tokenizer(extra_ids=0, clean_up_tokenization_spaces=True)
    text = "it 's so , he said ."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == "it's so, he said."
    assert text_of(tokenizer, tokens) == text
    assert "".join(pieces(TextDeltas(tokenizer), tokens)) == text
    stop = StopStrings(" ,", tokenizer)
    assert [stop(tokens[:n]) for n in (9, 10)] == [False, True]
    spans = source_spans(tokens, [False] * len(tokens), tokenizer)
    assert "".join(piece for piece, _ in spans) == text


def test_answers_are_not_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PreTrainedTokenizerFast.decode

    def decode(
        self: Any, ids: Any, clean_up_tokenization_spaces: Any = None, **options: Any
    ) -> str:
        text = plain(self, ids, **options)
        return text if clean_up_tokenization_spaces is False else text.replace(" ", "")

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", decode)
    kad = KnapsackDeferral.from_pretrained(str(ASSETS / "base"), str(ASSETS / "proxy"))
    prompt = evaluation_problems(1)[0].prompt
    options: dict[str, Any] = {"seed": 0, "max_new_tokens": 12, "eos_token_id": []}
    text = kad.generate(prompt, **options).text
    assert " " in text
    assert "".join(event.text or "" for event in kad.stream(prompt, **options)) == text
    search = BestOfN(kad.base, lambda _, texts: [t.count(" ") for t in texts], kad.tokenizer, n=4)
    found = search.generate(prompt, **options)
    assert max(found.rewards[0]) > 0
    assert " " in found.text


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "python"])
def test_incomplete_characters_are_held_back(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer("x🜚x", add_special_tokens=False)["input_ids"]
    streamed = pieces(TextDeltas(tokenizer), tokens)
    assert [piece for piece in streamed if piece] == ["x", "🜚", "x"]
    assert streamed[-4:] == ["", "", "🜚", "x"]
    broken = pieces(TextDeltas(tokenizer), tokens[:-2])
    assert broken[-2] == ""
    assert "".join(broken) == tokenizer.decode(tokens[:-2])


def test_broken_bytes_do_not_end_a_stream() -> None:
    """Where they change what was decoded before, as next to a character in fallback bytes."""
    tokenizer = tokenizer_of("sentencepiece")
    gold = tokenizer("🜚", add_special_tokens=False)["input_ids"][-4:]
    rest = tokenizer("Hello there", add_special_tokens=False)["input_ids"]
    tokens = gold + gold[:1] + rest
    text = tokenizer.decode(tokens)
    assert text.startswith("\ufffd" * 5)
    streamed = pieces(TextDeltas(tokenizer), tokens)
    assert streamed[3] == "🜚"
    assert "".join(streamed)[1:] == text[1:]
    for tokens in answers(tokenizer, 150, seed=0):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert len("".join(pieces(TextDeltas(tokenizer), tokens))) >= len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_end_before_stop_strings(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    stop = StopStrings(["User:", "User one", "e\n", "語の"], tokenizer)
    stopped = 0
    for tokens in answers(tokenizer, 60, seed=1, noise=kind != "sentencepiece"):
        end = next((n for n in range(1, len(tokens)) if stop(tokens[:n])), len(tokens))
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        streamed = pieces(TextDeltas(tokenizer, stop), tokens[:end])
        assert "".join(streamed) == stop.cut(text)
        stopped += stop.cut(text) != text
    assert stopped > 5


def test_text_that_may_become_a_stop_string() -> None:
    tokenizer = make_tokenizer()
    stop = StopStrings(["abc", "b!"], tokenizer)
    assert [stop.safe(text) for text in ("xa", "xab", "xabc?", "b", "abx", "")] == [
        "x", "x", "x", "", "abx", "",
    ]  # fmt: skip
    assert stop.cut("xab!") == "xa"
    ids = tokenizer("xabyabb!")["input_ids"]
    assert pieces(TextDeltas(tokenizer, stop), ids) == ["x", "", "", "aby", "", "", "ab", ""]
    # A stop string that the loop did not see, as special tokens are in it, ends the text too.
    end = tokenizer.eos_token_id
    ids = [*tokenizer("xb")["input_ids"], end, *tokenizer("!yz")["input_ids"]]
    assert pieces(TextDeltas(tokenizer, stop), ids) == ["x", "", "", "", "", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_are_those_of_transformers(kind: str) -> None:
    """The first token at which it stops, whatever the token borders, also at the first word."""
    tokenizer = tokenizer_of(kind)
    rng, stopped = random.Random(2), 0
    # Where the criterion does not know characters of several tokens.
    ascii_only = kind == "python" or Version(transformers.__version__) < Version("5.12")
    for tokens in answers(tokenizer, 60, seed=3, noise=kind != "python"):
        text = tokenizer.decode(tokens)
        start = rng.randrange(max(1, len(text)))
        strings = [text[start : start + rng.randint(1, 7)], rng.choice([" User:", "\nUser", "é"])]
        if (
            not strings[0]
            or "\ufffd" in strings[0]
            or (ascii_only and not "".join(strings).isascii())
        ):
            continue
        criterion, stop = StopStringCriteria(tokenizer, strings), StopStrings(strings, tokenizer)
        verdicts = [stop(tokens[:n]) for n in range(1, len(tokens) + 1)]
        expected = [
            bool(criterion(torch.tensor([tokens[:n]]), None)) for n in range(1, len(tokens) + 1)
        ]
        first = expected.index(True) if True in expected else len(tokens)
        assert verdicts[: first + 1] == expected[: first + 1], (strings, text)
        stopped += first < len(tokens)
    assert stopped > 20


def test_stop_strings_at_the_first_word() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    ids = tokenizer("User:")["input_ids"]
    assert StopStrings(" User:", tokenizer)(ids)
    assert not StopStrings(" User:", tokenizer)(ids[:-1])
    assert StopStrings("<end>", tokenizer)([*ids, tokenizer.eos_token_id])
    assert not StopStrings([], tokenizer)(ids)


def test_bad_stop_strings() -> None:
    with pytest.raises(ValueError, match="not empty"):
        StopStrings([""], make_tokenizer())
    with pytest.raises(ValueError, match="need a tokenizer"):
        StopStrings("a", None)

"""Best-of-n, soft best-of-n, ARGS, chunk-level beam search; rewards; the comparison of methods."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from models import EOS, PAD, base_model, greedy, make_tokenizer
from models import next_logits as all_logits
from scipy import stats

from tta_ext import ops, rng
from tta_ext.decoding import BestOfN, ChunkBeamSearch, RewardGuidedSearch, rewards
from tta_ext.decoding.search import compare as comparison
from tta_ext.decoding.search.base import SearchMethod
from tta_ext.journal import Journal

PROMPTS = ["hello there", "ab", "what is it"]
SMALL = {"max_new_tokens": 8, "eos_token_id": [], "probe": False}


def vowels(prompts: list[Any], responses: list[str]) -> list[float]:
    """Share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


def next_logits(tokens: list[int]) -> torch.Tensor:
    """Logits of the tokens that the tokenizer knows; the model has some more."""
    return all_logits(base_model(), tokens)[:, : len(make_tokenizer())]


def make(method: type[SearchMethod[Any]], reward: Any = vowels, **options: Any) -> Any:
    return method(base_model(), reward, make_tokenizer(), **(SMALL | options))


def tokens_of(result: Any) -> list[list[list[int]]]:
    return [[one.tokens for one in row] for row in result.candidates]


# ---- best of n -------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[], list(range(35))])
def test_best_of_n_draws_from_the_model(ends: list[int]) -> None:
    """Each token is the op's draw at the model's logits, keyed by position, iteration, rollout."""
    tokenizer = make_tokenizer()
    method = make(BestOfN, n=5, group=4, temperature=0.8, eos_token_id=ends)
    result = method.generate(PROMPTS, seed=6)
    lengths = {len(one.tokens) for row in result.candidates for one in row}
    # With ends, some rollouts leave the batch at its first step and others go on.
    assert (1 in lengths and len(lengths) > 2) == bool(ends)
    for p, row in enumerate(result.candidates):
        prompt = tokenizer(PROMPTS[p])["input_ids"]
        for one in row:
            for t, token in enumerate(one.tokens):
                drawn = ops.categorical_sample(
                    next_logits(prompt + one.tokens[:t]),
                    temperature=0.8,
                    seed=6,
                    position=len(prompt) + t,
                    sequence=p,
                    iteration=one.iteration,
                    rollout=one.rollout,
                )
                assert int(drawn) == token
    places = [(one.iteration, one.rollout) for one in result.candidates[0]]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert result.best[0].reward == max(result.rewards[0])


def test_greedy_is_what_transformers_says() -> None:
    method = BestOfN(base_model(), lambda p, r: [0.0] * len(r), n=2, decoding="greedy", **SMALL)
    result = method.generate([[9, 8, 7]], seed=0)
    assert tokens_of(result)[0] == [greedy(base_model(), [9, 8, 7], 8)] * 2


def test_group_and_batch_do_not_matter_for_distinct_streams() -> None:
    whole = make(BestOfN, n=6, group=3).generate(PROMPTS, seed=1)
    split = make(BestOfN, n=6, group=3, batch_size=2).generate(PROMPTS, seed=1)
    assert tokens_of(whole) == tokens_of(split)
    assert make(BestOfN, n=5, group=2).settings.schedule() == [2, 2, 1]
    assert make(BestOfN, n=5, group=9).settings.schedule() == [5]


def test_soft_best_of_n_follows_its_law() -> None:
    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        return [0.0, 0.5, 1.0, -math.inf][: len(responses)]

    method = make(BestOfN, reward, n=4, soft=0.5, max_new_tokens=1)
    search = method.start("x", seed=3)
    search.run()
    counts = Counter()
    for seed in range(2000):
        search.seed = seed
        counts[search.choose(0).rollout] += 1
    want = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0) * 2000
    assert counts[3] == 0
    assert stats.chisquare([counts[i] for i in range(3)], want.tolist()).pvalue > 1e-3
    assert method.generate("x", seed=3, soft=0.0).best[0].rollout == 2


def test_eos_ends_an_answer() -> None:
    result = make(BestOfN, n=16, eos_token_id=list(range(15))).generate("hello", seed=0)
    row = result.candidates[0]
    assert {one.finish for one in row} == {"eos", "length"}
    for one in row:
        assert all(token >= 15 for token in one.tokens[:-1])
        assert (one.tokens[-1] < 15) == (one.finish == "eos")


# ---- ARGS ------------------------------------------------------------------------------------


def args_by_hand(prompt: list[int], new: int, k: int, weight: float, ends: set[int]) -> list[int]:
    tokenizer, written = make_tokenizer(), []
    while len(written) < new and not (written and written[-1] in ends):
        log_p = next_logits(prompt + written)[0].log_softmax(-1)
        top = log_p.topk(k).indices.tolist()
        texts = [tokenizer.decode([*written, v], skip_special_tokens=True) for v in top]
        scores = [float(log_p[v]) + weight * r for v, r in zip(top, vowels([], texts), strict=True)]
        written.append(top[scores.index(max(scores))])
    return written


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_args_is_its_definition(weight: float) -> None:
    ends = {EOS, 10, 11, 12, 77, 73}
    method = make(RewardGuidedSearch, candidates=6, weight=weight, eos_token_id=sorted(ends), n=1)
    result = method.generate(PROMPTS, seed=0)
    tokenizer = make_tokenizer()
    for p, text in enumerate(PROMPTS):
        prompt = tokenizer(text)["input_ids"]
        want = args_by_hand(prompt, 8, 6, weight, ends)
        assert result.best[p].tokens == want
        # k a token, and the answer itself.
        assert result.curves[p][-1].samples == 6 * len(want) + 1
    assert result.timing.reward_items == sum(c[-1].samples for c in result.curves)


def test_args_sampling_follows_its_law() -> None:
    method = make(
        RewardGuidedSearch, decoding="sample", candidates=4, weight=3.0, max_new_tokens=1, n=2000
    )
    result = method.generate("hello", seed=0)
    prompt = make_tokenizer()("hello")["input_ids"]
    log_p = next_logits(prompt)[0].log_softmax(-1)
    top = log_p.topk(4).indices.tolist()
    texts = [make_tokenizer().decode([v], skip_special_tokens=True) for v in top]
    scores = log_p[top] + 3.0 * torch.tensor(vowels([], texts))
    counts = Counter(one.tokens[0] for one in result.candidates[0])
    assert set(counts) <= set(top)
    want = torch.softmax(scores.double(), 0) * 2000
    assert stats.chisquare([counts[v] for v in top], want.tolist()).pvalue > 1e-3


def test_args_when_the_reward_rules_everything_out() -> None:
    never = RewardGuidedSearch(
        base_model(), lambda p, r: [-math.inf] * len(r), candidates=3, **SMALL
    )
    result = never.generate([[9, 8, 7]], seed=0)
    assert result.best[0].tokens == greedy(base_model(), [9, 8, 7], 8)


# ---- chunk-level beam search -----------------------------------------------------------------


def beams_by_hand(prompt: list[int], p: int, seed: int, ends: set[int]) -> list[list[int]]:
    """Three beams, two branches, chunks of three tokens, eight tokens."""
    tokenizer = make_tokenizer()

    def extend(tokens: list[int], chunk: int, rollout: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(3):
            if len(tokens) == 8 or (tokens and tokens[-1] in ends):
                break
            drawn = ops.categorical_sample(
                next_logits(prompt + tokens), seed=seed,
                position=len(prompt) + len(tokens), sequence=p, iteration=chunk, rollout=rollout,
            )  # fmt: skip
            tokens.append(int(drawn))
        return tokens

    parents: list[list[int]] = [[]] * 3
    finished: list[list[int]] = []
    for chunk in range(3):
        if not parents:
            break
        pool = list(finished)
        pool += [extend(t, chunk, 2 * i + j) for i, t in enumerate(parents) for j in range(2)]
        score = vowels([], [tokenizer.decode(t, skip_special_tokens=True) for t in pool])
        order = sorted(range(len(pool)), key=lambda i: -score[i])[:3]
        kept = [pool[i] for i in order]
        parents = [t for t in kept if len(t) < 8 and t[-1] not in ends]
        finished = [t for t in kept if t not in parents]
    return sorted(finished)


@pytest.mark.parametrize("ends", [set(), {5, 6, 7, 30, 31, 60, 61, 62}])
def test_chunk_beam_is_its_definition(ends: set[int]) -> None:
    method = make(ChunkBeamSearch, beams=3, branches=2, chunk=3, eos_token_id=sorted(ends))
    result = method.generate(PROMPTS, seed=4)
    tokenizer = make_tokenizer()
    for p, text in enumerate(PROMPTS):
        prompt = tokenizer(text)["input_ids"]
        assert sorted(tokens_of(result)[p]) == beams_by_hand(prompt, p, 4, ends)
        assert result.best[p].reward == max(result.rewards[p])
        assert len(result.candidates[p]) <= 3
    assert result.timing.reward_items == sum(c[-1].samples for c in result.curves)
    assert result.timing.tokens == sum(c[-1].tokens for c in result.curves)


def test_one_chunk_is_best_of_n() -> None:
    beams = make(ChunkBeamSearch, beams=1, branches=6, chunk=8).generate(PROMPTS, seed=2)
    plain = make(BestOfN, n=6).generate(PROMPTS, seed=2)
    assert [one.tokens for one in beams.best] == [one.tokens for one in plain.best]


def test_restarts_are_independent() -> None:
    twice = make(ChunkBeamSearch, beams=2, branches=2, chunk=4, restarts=2)
    result = twice.generate(PROMPTS, seed=0)
    once = make(ChunkBeamSearch, beams=2, branches=2, chunk=4).generate(PROMPTS, seed=0)
    for both, first in zip(tokens_of(result), tokens_of(once), strict=True):
        assert both[: len(first)] == first
        assert both[len(first) :] != first
    assert [c.samples for c in result.curves[0]] == [8, 16]
    assert [c.tokens for c in result.curves[0]] == [32, 64]


# ---- budgets ---------------------------------------------------------------------------------


def test_budgets() -> None:
    from tta_ext.decoding.search.aisp import AISPSettings
    from tta_ext.decoding.search.best_of_n import BestOfNSettings
    from tta_ext.decoding.search.chunk_beam import ChunkBeamSettings
    from tta_ext.decoding.search.reward_guided import RewardGuidedSettings

    assert AISPSettings(n=16).for_samples(100).schedule() == [16] * 6
    assert sum(BestOfNSettings(group=16).for_samples(100).schedule()) == 100
    assert ChunkBeamSettings().for_samples(100).schedule() == [16] * 6
    one = RewardGuidedSettings().for_samples(100)
    assert (one.schedule(), one.decoding) == ([100], "sample")
    for settings in (
        AISPSettings(), BestOfNSettings(group=8), ChunkBeamSettings(), RewardGuidedSettings()
    ):  # fmt: skip
        timed = settings.for_seconds(2.0)
        assert timed.max_seconds == 2.0
        assert 500 < len(timed.schedule()) <= rng.ITERATIONS
    with pytest.raises(ValueError, match="samples is 8, expected at least 16"):
        AISPSettings().for_samples(8)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (BestOfN, {"n": 0}, "n is 0"),
        (BestOfN, {"group": 0}, "group is 0"),
        (BestOfN, {"soft": -1.0}, "soft is -1.0"),
        (BestOfN, {"n": 70000}, "n is 70000, expected 1 to 65536"),
        (RewardGuidedSearch, {"candidates": 0}, "candidates is 0"),
        (RewardGuidedSearch, {"weight": math.nan}, "weight is nan"),
        (RewardGuidedSearch, {"top_k": 3}, "ARGS chooses among its candidates"),
        (ChunkBeamSearch, {"beams": 0}, "beams is 0"),
        (ChunkBeamSearch, {"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_settings(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(method, **options)


# ---- rewards ---------------------------------------------------------------------------------


def test_verifiable_rewards() -> None:
    texts = ["Silly Sam's song", "", "a s", "Über-süß 12 so"]
    assert rewards.LetterReward("S")([""] * 4, texts) == [1.0, 0.0, 0.5, 0.5]
    json_texts = ['{"a": [1]}', 'so: {"a": 1}', "{a", "7", "[" * 100000]
    assert rewards.JsonReward()([""] * 5, json_texts) == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert rewards.LengthReward(4)([""] * 3, ["one two", "a b c d", ""]) == [-0.5, 0.0, -1.0]
    both = rewards.WeightedReward([(2.0, rewards.LetterReward("s")), (1.0, rewards.JsonReward())])
    assert both([""], ["so"]) == [2.0]


def test_sentiment() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad = rewards.parse_reward("sentiment")(["", ""], ["I love it!", "I hate it."])
    assert bad < 0 < good
    assert rewards.parse_reward("sentiment:negative")([""], ["I hate it."]) == [-bad]


def test_parse_reward() -> None:
    assert isinstance(rewards.parse_reward("letter:x"), rewards.LetterReward)
    texts = ["She sells sea shells, she said", "so so so so", "none", ""]
    assert rewards.parse_reward("letter:s")(texts, texts) == [1.0, 1.0, 0.0, 0.0]
    assert rewards.parse_reward("letter:s:distinct")(texts, texts) == [5.0, 1.0, 0.0, 0.0]
    assert rewards.parse_reward("words:7").target == 7  # type: ignore[attr-defined]
    assert rewards.parse_reward("python:math:fsum") is math.fsum
    for text in (
        "nothing",
        "python:math",
        "python:math:nothing",
        "letter:ab",
        "letter:s:x",
        "words:0",
    ):
        with pytest.raises(ValueError):
            rewards.parse_reward(text)


def test_call_reward_takes_tensors_and_refuses_junk() -> None:
    assert rewards.call_reward(lambda p, r: torch.tensor([[1.0], [2.0]]), "ab", "ab") == [1.0, 2.0]
    with pytest.raises(TypeError, match="returned NoneType, expected a number"):
        rewards.call_reward(lambda p, r: None, "a", "b")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("kind", ["LlamaConfig", "BertConfig"])
def test_classifier_reward(kind: str) -> None:
    config = getattr(transformers, kind)(
        vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, num_labels=3, pad_token_id=PAD,
        id2label={0: "bad", 1: "fine", 2: "good"},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    reward = rewards.ClassifierReward(model, tokenizer, label="good", batch_size=2)
    assert tokenizer.decode(reward.encode("hi", "yes")) == "u:hi\na:yes\n"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert tokenizer.decode(reward.encode(chat, "yes")) == "s:s\nu:hi\na:yes\n"
    assert len(reward.encode("x" * 100, "yes")) == 64
    prompts, responses = ["a", "bb", "c"], ["short", "a longer answer", ""]
    together = reward(prompts, responses)
    for i in range(3):
        ids = torch.tensor([reward.encode(prompts[i], responses[i])])
        with torch.inference_mode():
            alone = model.eval()(input_ids=ids).logits[0]
        assert together[i] == pytest.approx(float(alone[2]), abs=1e-5)
    sure = rewards.ClassifierReward(model, tokenizer, label=2, probability=True)(prompts, responses)
    assert all(value < 0 for value in sure)
    plain = rewards.ClassifierReward(model, make_tokenizer(), label=0)
    assert len(plain(prompts, responses)) == 3
    with pytest.raises(ValueError, match="3 outputs; choose one: bad, fine, good"):
        rewards.ClassifierReward(model, tokenizer)
    with pytest.raises(ValueError, match="label is 'great', expected one of bad, fine, good"):
        rewards.ClassifierReward(model, tokenizer, label="great")


# ---- comparison ------------------------------------------------------------------------------

CONTESTANTS = ["aisp:n=4,sigma=0.4", "plain=best_of_n:group=4", "chunk_beam:beams=2,branches=2"]


def run(journal: Journal | None = None, **options: Any) -> list[dict[str, Any]]:
    return comparison.compare(
        base_model(),
        make_tokenizer(),
        vowels,
        PROMPTS,
        [comparison.Contestant.parse(text) for text in CONTESTANTS],
        common={"max_new_tokens": 6},
        journal=journal,
        **({"samples": 8} | options),
    )


def test_compare_resumes_and_pairs(tmp_path: Any, monkeypatch: Any) -> None:
    path = tmp_path / "journal.jsonl"
    whole = run(Journal(path))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole) == 9
    path.write_text("".join(lines[:4]))

    def timeless(records: Any) -> list[tuple[Any, ...]]:
        return [(r["key"], r["index"], r["label"], r["reward"], r["text"]) for r in records]

    assert timeless(run(Journal(path))) == timeless(whole)
    again = path.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4]
    assert timeless(map(json.loads, again)) == timeless(map(json.loads, lines))
    with monkeypatch.context() as patch:
        patch.setattr(SearchMethod, "generate", pytest.fail)
        assert timeless(run(Journal(path))) == timeless(whole)
    run(Journal(path), tag="another model")
    assert len(path.read_text().splitlines()) == 18
    by_prompt = [r["reward"] for r in whole if r["label"] == "plain"]
    steered = [r["reward"] for r in whole if r["label"] == CONTESTANTS[0]]
    pair = comparison.paired(whole, "plain")[0]
    differences = [a - b for a, b in zip(steered, by_prompt, strict=True)]
    assert pair.difference == pytest.approx(sum(differences) / 3)
    assert pair.error == pytest.approx(stats.sem(differences))
    assert pair.wins + pair.ties + pair.losses == pair.prompts == 3
    rows = comparison.summary(whole)
    assert [row["label"] for row in rows] == [CONTESTANTS[0], "plain", CONTESTANTS[2]]
    assert all(row["tokens"] <= 8 * 6 for row in rows)
    with pytest.raises(ValueError, match="baseline is 'x'"):
        comparison.paired(whole, "x")


def test_compare_by_seconds_and_plot(tmp_path: Any) -> None:
    records = run(samples=None, seconds=0.05)
    for record in records:
        curve = record["curve"]
        assert curve[-1]["seconds"] >= 0.05
        assert all(point["seconds"] < 0.05 for point in curve[:-1])
    for axis in ("samples", "tokens", "seconds"):
        for xs, ys in comparison.curve_means(records, axis, points=20).values():
            assert xs == sorted(xs)
            assert ys == sorted(ys)
    pytest.importorskip("matplotlib")
    comparison.plot(records, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="expected one budget"):
        run(seconds=1.0)


def test_infinite_rewards_have_a_summary() -> None:
    point = dict.fromkeys(("kl", "norm", "ess")) | {"samples": 1}
    timing = dict.fromkeys(("tokens", "total", "model", "reward", "other"), 1.0)
    records = [
        {"label": label, "index": i, "reward": r, "curve": [point | {"mean": r}], "timing": timing}
        for label, rewards_ in (("a", [-math.inf, 1.0]), ("b", [1.0, -math.inf]))
        for i, r in enumerate(rewards_)
    ]
    assert math.isnan(comparison.paired(records, "a")[0].difference)
    assert [row["reward"] for row in comparison.summary(records)] == [-math.inf, -math.inf]


def test_parsing_of_contestants() -> None:
    one = comparison.Contestant.parse("mine=best-of-n:n=4,soft=0.5,decoding=greedy")
    assert (one.label, one.method) == ("mine", "best_of_n")
    assert one.settings == {"n": 4, "soft": 0.5, "decoding": "greedy"}
    assert comparison.Contestant.parse("args").label == "args"
    with pytest.raises(ValueError, match="method is 'nothing', expected one of aisp"):
        comparison.Contestant.parse("nothing")
    with pytest.raises(ValueError, match="setting is 'n', expected name=value"):
        comparison.Contestant.parse("args:n")
    with pytest.raises(ValueError, match="expected different ones"):
        comparison.compare(
            base_model(), None, vowels, [], [comparison.Contestant.parse("args")] * 2
        )


# ---- the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    base_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def command(*words: str) -> int:
    pytest.importorskip("typer")
    from tta_ext.cli.app import run as run_command

    return run_command(words)


def test_search_command(folder: str, tmp_path: Any, capsys: Any) -> None:
    out = tmp_path / "out.jsonl"
    words = [
        "search", "--method", "aisp", "--model", folder, "--reward", "words:3", "--n", "4",
        "--iterations", "2", "--sigma", "0.4", "--set", "alpha=0.99", "--max-new-tokens", "6",
        "--seed", "1", "--output", str(out), "hello",
    ]  # fmt: skip
    assert command(*words) == 0
    assert command(*words, "ab") == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1]
    assert len(records[0]["rewards"]) == 8
    assert len(records[0]["curve"]) == 2
    assert command("search", "--method", "best-of-n", "--model", folder, "hello") == 2
    assert "Missing option '--reward'" in capsys.readouterr().err
    greedy_words = ["search", "--method", "args", "--model", folder, "--reward", "json"]
    assert command(*greedy_words, "--max-new-tokens", "4", "hello") == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "best_of_n", "--sigma", "1"], "--method best_of_n does not use --sigma"),
        (["--method", "chunk-beam", "--n", "4"], "--method chunk-beam does not use --n"),
        (["--soft", "0.5"], "--method aisp does not use --soft"),
        (["--method", "args", "--iterations", "2"], "--method args does not use --iterations"),
        (["--output", "x.jsonl", "--jsonl"], "--output does not use --jsonl"),
    ],
)
def test_an_unused_option_is_refused(words: list[str], message: str, capsys: Any) -> None:
    """Before any model is loaded."""
    assert command("search", "--model", "/nowhere", "--reward", "json", *words, "hello") == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_search_resumes_without_a_seed(folder: str, tmp_path: Any) -> None:
    out = tmp_path / "out.jsonl"
    words = ["search", "--model", folder, "--reward", "json", "--n", "2", "--iterations", "1",
             "--max-new-tokens", "3", "--batch-size", "1", "--output", str(out)]  # fmt: skip
    assert command(*words, "hello", "ab") == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0])
    assert command(*words, "hello", "ab") == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["text"] for one in again] == [json.loads(line)["text"] for line in lines]


def test_compare_command(folder: str, tmp_path: Any, capsys: Any) -> None:
    words = [
        "compare", "--model", folder, "--reward", "letter:a", "--method", "aisp:n=4",
        "--method", "best_of_n:group=4", "--samples", "8", "--max-new-tokens", "6",
        "--journal", str(tmp_path / "j.jsonl"), "--output", str(tmp_path / "o.json"),
        "hello", "ab",
    ]  # fmt: skip
    assert command(*words) == 0
    first = capsys.readouterr().out
    assert "win rate" in first
    lines = (tmp_path / "j.jsonl").read_text()
    assert command(*words) == 0
    assert (tmp_path / "j.jsonl").read_text() == lines
    assert capsys.readouterr().out == first
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["paired"][0]["prompts"] == 2
    assert command("compare", "--model", folder, "hello") == 2
    assert command(*words, "--baseline", "x") == 1

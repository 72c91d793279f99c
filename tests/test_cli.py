"""The ``tta`` command, run in this process."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from models import base_model, make_tokenizer, proxy_model
from rich.console import Console

from tta_ext.cli import app as app_module
from tta_ext.cli import common
from tta_ext.cli.search import reward_facts
from tta_ext.cli.sweep import parse_range
from tta_ext.evaluation import data_task

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny pair on disk."""
    root = tmp_path_factory.mktemp("pair")
    for name, model in (("base", base_model()), ("proxy", proxy_model())):
        model.save_pretrained(root / name)
        make_tokenizer(template=TEMPLATE).save_pretrained(root / name)
    return ["--base", str(root / "base"), "--proxy", str(root / "proxy")]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


GENERATE = ["generate", "--seed", "3", "--max-new-tokens", "6", "--rule", "knapsack",
            "--param", "0.4"]  # fmt: skip


def test_generate_prints_text(capsys: Any, pair: list[str]) -> None:
    status, out, _ = call(capsys, *GENERATE, *pair, "hello", "you")
    assert status == 0
    again = call(capsys, *GENERATE, *pair, "hello", "you")[1]
    assert out == again
    # Several answers say whose they are; a single one is nothing but itself.
    status, one, _ = call(capsys, *GENERATE, *pair, "hello")
    assert out.startswith("[0] hello\n" + one)
    assert "\n[1] you\n" in out


def test_generate_jsonl_from_a_file_resumes(capsys: Any, pair: list[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts: list[Any] = [
        {"prompt": "one"},
        {"messages": [{"role": "user", "content": "two"}]},
        {"prompt": "three"},
    ]
    source.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    options = [*GENERATE, *pair, "--input", str(source), "--samples", "2", "--batch-size", "2"]
    assert call(capsys, *options, "--output", str(output))[0] == 0
    whole = output.read_text().splitlines()
    records = [json.loads(line) for line in whole]
    assert [r["index"] for r in records] == [0, 1, 2]
    assert all(len(r["texts"]) == len(r["tokens"]) == 2 for r in records)
    # Cut off in the middle of the second line: the run goes on as if nothing had happened.
    output.write_text(whole[0] + "\n" + whole[1][:30])
    status, _, errors = call(capsys, *options, "--output", str(output))
    assert status == 0
    assert "2 answered, 1 were there" in errors
    assert output.read_text().splitlines() == whole
    status, out, _ = call(capsys, *options, "--jsonl")
    assert [json.loads(line)["texts"] for line in out.splitlines()] == [r["texts"] for r in records]


def test_generate_from_stdin(capsys: Any, pair: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\r\n\nyou\n")))
    piped = call(capsys, *GENERATE, *pair)[1]
    assert piped == call(capsys, *GENERATE, *pair, "hello", "you")[1]


def test_generate_stream_colour_chat(capsys: Any, pair: list[str]) -> None:
    plain = call(capsys, *GENERATE, *pair, "hello")[1]
    assert call(capsys, *GENERATE, *pair, "hello", "--stream")[1] == plain
    assert call(capsys, *GENERATE, *pair, "hello", "--colour")[0] == 0
    chat = call(capsys, *GENERATE, *pair, "hello", "--chat", "--system", "short")[1]
    rendered = call(capsys, *GENERATE, *pair, "system: short\nuser: hello\nassistant: ")[1]
    assert chat == rendered
    options = ["--method", "implicit-reward", "--max-new-tokens", "3", "hi"]
    assert call(capsys, "generate", *pair, *options)[0] == 0


def test_trace(capsys: Any, pair: list[str], tmp_path: Path) -> None:
    output = tmp_path / "trace.jsonl"
    status, out, _ = call(
        capsys, "trace", *pair, "--rule", "knapsack", "--param", "0.4", "--max-new-tokens", "5",
        "--output", str(output), "hello",
    )  # fmt: skip
    assert status == 0
    assert "deferred mass" in out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["source"] for line in lines} <= {"base", "proxy"}
    assert all(0 <= line["q"] <= 1 and 0 <= line["p"] <= 1 for line in lines)
    assert all(line["deferred_mass"] <= 0.4 for line in lines)


def test_eval_and_sweep_on_data(capsys: Any, pair: list[str], tmp_path: Path) -> None:
    data, journal, output = tmp_path / "d.jsonl", tmp_path / "j.jsonl", tmp_path / "rows.json"
    options = ["--mode", "greedy", "--n", "3", "--batch-size", "2", "--max-new-tokens", "4"]
    prompts = ["ab", "cd", "ef", "gh"]
    answers = [base_answer(p) for p in prompts]
    answers[1] = "something else"
    data.write_text(
        "".join(
            json.dumps({"prompt": p, "answer": a}) + "\n"
            for p, a in zip(prompts, answers, strict=True)
        )
    )
    arguments = ["eval", "base", "proxy", "knapsack:0.5", *pair, "--data", str(data), *options,
                 "--journal", str(journal), "--output", str(output)]  # fmt: skip
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    rows = json.loads(output.read_text())
    assert [row["rule"] for row in rows] == ["base", "proxy", "knapsack"]
    assert rows[0]["exact"] == pytest.approx(2 / 3)
    assert rows[0]["proxy_call_rate"] == 0.0
    assert rows[1]["deferred_rate"] == 1.0
    assert all(row["tokens"] == 4.0 for row in rows[:2])
    assert "0.667" in out
    lines = journal.read_text().splitlines()
    assert len(lines) == 6
    journal.write_text("\n".join(lines[:3]) + "\n" + lines[3][:10])
    assert call(capsys, *arguments)[0] == 0
    assert json.loads(output.read_text()) != []
    assert len(journal.read_text().splitlines()) == 6
    picture = tmp_path / "sweep.svg"
    status, out, _ = call(
        capsys, "sweep", "--plot", str(picture), *pair, "--data", str(data), *options,
        "--rule", "dual", "--params", "0:1:0.5",
    )  # fmt: skip
    assert status == 0
    rows, _, behind = out.partition("greedy: behind threshold ")
    assert [line.split()[1] for line in rows.splitlines() if "threshold" in line] == [
        "0",
        "0.5",
        "1",
    ]
    assert behind.count("threshold") == 2
    assert "tta_ext" in picture.read_text()


def base_answer(prompt: str) -> str:
    tokenizer = make_tokenizer()
    from models import greedy

    tokens = greedy(base_model(), tokenizer(prompt)["input_ids"], 4)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_parse_range() -> None:
    assert parse_range("0.1:0.5:0.2") == [0.1, 0.3, 0.5]
    assert parse_range("1,2.5") == [1.0, 2.5]
    for wrong in ("a", "1:2", "1:0:1", "1:2:0"):
        with pytest.raises(ValueError, match="--params"):
            parse_range(wrong)


@pytest.mark.parametrize(
    ("text", "pattern", "exact", "formatted"),
    [
        (" 56 ", None, True, True),
        ("#### 4 or #### 56", r"#### (\d+)", True, True),
        ("#### 56 or #### 4", r"#### (\d+)", False, True),
        ("4 56", r"\d+", True, True),
        ("none", r"\d", False, False),
    ],
)
def test_scores_of_data(
    tmp_path: Path, text: str, pattern: str | None, exact: bool, formatted: bool
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('\ufeff{"prompt": "a\u2028", "answer": 56}\n\n{"messages": [], "answer": 1}\n')
    task = data_task(data, pattern=pattern)
    assert task.prompts == ["a\u2028", []]
    assert task.score(0, text) == (exact, exact, formatted)


def test_answers_of_gsm8k_are_read_as_they_are(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('\n{"question": "a", "answer": "2 + 2 = <<2+2=4>>4\\n#### 4"}\n')
    task = data_task(data, pattern=r"#### (\d+)")
    assert (task.prompts, task.name(0)) == (["a"], "line 2, problem 0")
    assert task.score(0, "so #### 4").exact
    assert not task.score(0, "so #### 5").exact
    assert not task.score(0, "so 4").formatted


def test_bad_data(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    for content, message in (
        ("\n", "has no problems"),
        ('{"prompt": "a"}\n', "line 1 of .* has no 'answer'"),
        ('{"answer": "a"}\n', "neither 'prompt' nor 'messages'"),
        ('\n{"answer"\n', "line 2 of .* is not JSON"),
    ):
        data.write_text(content)
        with pytest.raises(ValueError, match=message):
            data_task(data)
    data.write_text('{"prompt": "a", "answer": 1}\n')
    with pytest.raises(ValueError, match="not a regular expression"):
        data_task(data, pattern="(")


def test_doctor_and_version(capsys: Any) -> None:
    status, out, _ = call(capsys, "doctor")
    assert status == 0
    assert "deferral_sample" in out
    status, out, _ = call(capsys, "doctor", "--json")
    assert {op["name"] for op in json.loads(out)["ops"]} >= {"deferral_propose", "greedy_knapsack"}
    status, out, _ = call(capsys, "--version")
    assert (status, out.split()[0]) == (0, "tta_ext")


COMPARE = ["compare", "--model", "/nowhere", "--reward", "json", "hello"]
SEARCH = ["search", "--model", "/nowhere", "--reward", "json", "hello"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate", "--base", "x", "hi"], 1, "--base and --proxy belong together"),
        (["generate", "--rule", "best", "hi"], 1, "rule is 'best'"),
        (["generate", "--dtype", "int3", "hi"], 2, "Invalid value for '--dtype'"),
        (["generate", "--method", "aisp", "hi"], 1, "tta search --method aisp"),
        (["generate", "--method", "best_of_n", "hi"], 1, "tta search --method best_of_n"),
        (["generate", "--method", "magic", "hi"], 1, "expected kad or implicit-reward"),
        (["generate", "--reward", "json", "hi"], 2, "No such option"),
        (["generate", "--rule", "argmax", "--param", ".3", "hi"], 1, "argmax does not use --param"),
        (["generate", "--anti", "x", "hi"], 1, "rule threshold does not use --anti"),
        (["generate", "--critical", "split", "hi"], 1, "rule threshold does not use --critical"),
        (
            ["generate", "--method", "implicit-reward", "--rule", "nudging", "hi"],
            1,
            "--method implicit-reward does not use --rule",
        ),
        (["generate", "--stream", "--jsonl", "hi"], 1, "--stream does not use --jsonl"),
        (["generate", "--stream", "--output", "x", "hi"], 1, "--stream does not use --output"),
        (["generate", "--jsonl", "--colour", "hi"], 1, "--jsonl does not use --colour"),
        (["trace", "--rule", "dual", "--critical", "split", "hi"], 1, "does not use --critical"),
        (
            ["trace", "--reward", "json", "--set", "temperature=2", "--temperature", "1", "hi"],
            1,
            "--set temperature=... does not use --temperature",
        ),
        (["sweep", "--critical", "split"], 1, "rule threshold does not use --critical"),
        (["eval", "base", "--anti", "x"], 1, "does not use --anti"),
        (["eval", "base", "--pattern", "x"], 1, "does not use --pattern"),
        (["generate", "--base", "/nowhere", "--proxy", "/nowhere", "hi"], 1, "no folder"),
        (["generate", "--device", "cuda:99", "hi"], 1, "cannot use device cuda:99"),
        (["generate", "--device", "moon", "hi"], 1, "cannot use device moon"),
        (["generate", "--nonsense", "hi"], 2, "No such option"),
        (["generate", "--threads", "0", "hi"], 2, "Invalid value for '--threads'"),
        (["eval", "threshold"], 1, "has no parameter"),
        (["eval", "--data", "nothing.jsonl"], 1, "nothing.jsonl"),
        (["eval", "--proxy", "x"], 1, "belong together"),
        (["eval", "threshold:nan"], 1, "param is nan"),
        (["eval", "knapsack:-1"], 1, "param is -1"),
        (["eval", "implicit_reward:inf"], 1, "param is inf"),
        (
            ["eval", "base", "--n", "1", "--seed", str(2**70)],
            1,
            "tta: seed is 1180591620717411303424",
        ),
        (["sweep", "--rule", "argmax"], 1, "argmax has no parameter"),
        (["sweep", "--params", "0:inf:1"], 1, "--params is '0:inf:1'"),
        (["sweep", "--params", "0:1:1e-12"], 1, "at most 10000"),
        (["generate", "--quantization-config", "[]", "hi"], 1, "expected a JSON object"),
        (["generate", "--revision", "main", "hi"], 1, "so it has no revision main"),
        (["generate", "--device-map", "auto", "--device", "cpu", "hi"], 1, "device_map is given"),
        (["generate", "--runner", "fast", "hi"], 1, "runner is 'fast', expected None or one of"),
        (["generate", "--top-k", "0", "hi"], 1, "top_k"),
        (["generate", "--samples", "0", "hi"], 2, "Invalid value for '--samples'"),
        (["eval", "--data", "x", "--output", "/dev/null/x"], 1, "x"),
        # Before any model is loaded.
        ([*SEARCH, "--method", "best_of_n", "--sigma", "1"], 1, "best_of_n does not use --sigma"),
        ([*SEARCH, "--method", "chunk-beam", "--n", "4"], 1, "chunk-beam does not use --n"),
        ([*SEARCH, "--soft", "0.5"], 1, "--method aisp does not use --soft"),
        ([*SEARCH, "--method", "args", "--iterations", "2"], 1, "args does not use --iterations"),
        ([*SEARCH, "--output", "x.jsonl", "--jsonl"], 1, "--output does not use --jsonl"),
        ([*SEARCH, "--set", "depth=3"], 1, "aisp has no setting 'depth'"),
        ([*SEARCH, "--set", "n=3", "--n", "4"], 1, "--set n=... does not use --n"),
        ([*SEARCH, "--set", "decoding=sample", "--greedy"], 1, "does not use --greedy"),
        ([*SEARCH, "--set", "n=3", "--set", "n=4"], 1, "setting n is given twice"),
        ([*COMPARE, "--set", "max_new_tokens=3", "--max-new-tokens", "4"], 1, "does not use --max"),
        ([*SEARCH, "--set", "top_k=x"], 1, "setting top_k is 'x', expected int | None"),
        ([*COMPARE, "--method", "aisp:n=x"], 1, "setting n is 'x'"),
        ([*COMPARE, "--method", "aisp:n=True"], 1, "setting n is True"),
        ([*COMPARE, "--method", "=aisp"], 1, "method is '=aisp', whose label is empty"),
        (["eval", "--n", "99999999"], 1, "n is 99999999, expected 1 to 10000"),
        ([*COMPARE, "--plot", "x.txt"], 1, "x.txt has no ending of a picture"),
        ([*COMPARE, "--reward", "sentiment:neg"], 1, "'neg', expected '' or 'positive'"),
        ([*COMPARE, "--reward", "json:x"], 1, "after the reward's colon is 'x'"),
        ([*COMPARE, "--reward", "words:x"], 1, "words:x is not known"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_are_one_sentence(
    capsys: Any, monkeypatch: Any, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.setattr(common, "errors", Console(stderr=True, width=300))
    monkeypatch.setattr(app_module, "errors", Console(stderr=True, width=300))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, _, errors = call(capsys, *arguments)
    assert found == status
    assert message in errors
    assert "Traceback" not in errors


def test_demo(capsys: Any) -> None:
    status, out, _ = call(capsys, "demo", "--n", "1", "--answers", "1", "--threads", "1")
    assert status == 0
    assert "threshold 0.4" in out
    assert "time of the loop" in out
    assert "deferral_propose" in out
    for method in ("aisp", "best_of_n"):
        assert f"{method}: mean reward by iteration" in out
    assert torch.get_num_threads() == 1


def test_search_command(capsys: Any, pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = [
        "search", "--method", "aisp", "--model", pair[1], "--reward", "words:3", "--n", "4",
        "--iterations", "2", "--sigma", "0.4", "--set", "alpha=0.99", "--max-new-tokens", "6",
        "--seed", "1", "--output", str(out), "hello",
    ]  # fmt: skip
    assert call(capsys, *words)[0] == 0
    assert call(capsys, *words, "ab")[0] == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1]
    assert len(records[0]["rewards"]) == 8
    assert len(records[0]["curve"]) == 2
    status, _, errors = call(capsys, "search", "--method", "best-of-n", "--model", pair[1], "hello")
    assert status == 2
    assert "Missing option '--reward'" in errors
    greedy_words = ["search", "--method", "args", "--model", pair[1], "--reward", "json"]
    status, text, _ = call(capsys, *greedy_words, "--max-new-tokens", "4", "hello")
    assert status == 0
    assert text.strip()


def test_search_resumes_without_a_seed(capsys: Any, pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["search", "--model", pair[1], "--reward", "json", "--n", "2", "--iterations", "1",
             "--max-new-tokens", "3", "--batch-size", "1", "--output", str(out)]  # fmt: skip
    assert call(capsys, *words, "hello", "ab")[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0])
    assert call(capsys, *words, "hello", "ab")[0] == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["text"] for one in again] == [json.loads(line)["text"] for line in lines]
    # By another runner, whose last bits may differ, they are other answers.
    assert call(capsys, *words, "hello", "ab", "--runner", "lockstep")[0] == 0
    assert len(out.read_text().splitlines()) == 4


def test_a_reward_beside_the_user_is_known_by_what_is_in_it(
    monkeypatch: Any, tmp_path: Path
) -> None:
    """Also where another process has the reward itself, as with workers of Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    found = []
    for text in ("1", "22"):
        (tmp_path / "beside_me.py").write_text(text)
        found.append(reward_facts("python:beside_me:reward")["fingerprint"])
    assert found[0] and found[1] and found[0] != found[1]


def test_compare_command(capsys: Any, pair: list[str], tmp_path: Path) -> None:
    words = [
        "compare", "--model", pair[1], "--reward", "letter:a", "--method", "aisp:n=4",
        "--method", "best_of_n:group=4", "--samples", "8", "--max-new-tokens", "6",
        "--journal", str(tmp_path / "j.jsonl"), "--output", str(tmp_path / "o.json"),
        "hello", "ab",
    ]  # fmt: skip
    status, first, _ = call(capsys, *words)
    assert status == 0
    assert "win rate" in first
    lines = (tmp_path / "j.jsonl").read_text()
    assert call(capsys, *words)[:2] == (0, first)
    assert (tmp_path / "j.jsonl").read_text() == lines
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["paired"][0]["prompts"] == 2
    assert call(capsys, "compare", "--model", pair[1], "hello")[0] == 2
    assert call(capsys, *words, "--baseline", "x")[0] == 1
    status, measured, _ = call(capsys, *words, "--metric", "diversity", "--metric", "words:2")
    assert status == 0
    assert "diversity" in measured and "words:2" in measured
    metrics = json.loads((tmp_path / "o.json").read_text())["methods"][0]["metrics"]
    assert list(metrics) == ["diversity", "words:2"]
    assert 0.0 <= metrics["diversity"][0] <= 1.0
    assert call(capsys, *words, "--metric", "beauty")[0] == 1

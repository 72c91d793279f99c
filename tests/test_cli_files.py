"""What the command reads and writes: prompts, answers, errors among them, configs, reports."""

from __future__ import annotations

import datetime
import inspect
import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from commands import GENERATE, call, lines
from rich.console import Console

from tta_ext._version import __version__
from tta_ext.cli import common, config, progress
from tta_ext.cli.app import COMMANDS
from tta_ext.cli.prompts import Asked, read_prompts
from tta_ext.journal import json_line

SEARCH = ["search", "--model", "demo", "--reward", "letter:s", "--method", "best-of-n", "--n", "2",
          "--max-new-tokens", "2"]  # fmt: skip
HELP = """
import sys
sys.argv = sys.orig_argv = ["tta", *{arguments}]
from tta_ext.cli import main
try:
    main()
finally:
    print("loaded", *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "-h"], ["compare", "-h"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    program = HELP.format(arguments=arguments)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Usage: tta" in run.stdout
    loaded = set(run.stderr.rpartition("loaded")[2].split())
    assert "tta_ext.cli.app" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "numpy", "yaml", "matplotlib"}
    modules = {f"tta_ext.cli.{one.module}" for one in COMMANDS.values()}
    assert arguments != ["--help"] or not loaded & modules


def test_the_list_of_commands_says_what_they_say() -> None:
    for name, one in COMMANDS.items():
        function = getattr(import_module(f"tta_ext.cli.{one.module}"), one.function)
        assert inspect.getdoc(function).startswith(one.first), name  # type: ignore[union-attr]


def test_a_command_that_is_none_gets_a_suggestion(capsys: Any) -> None:
    status, _, errors = call(capsys, "generat")
    assert status == 2
    assert "Did you mean 'generate'?" in errors


def test_the_operators_are_there_when_a_command_runs() -> None:
    program = HELP.format(arguments=["trace", "--max-new-tokens", "1", "Q:"])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "deferred mass" in run.stdout


def test_prompts(tmp_path: Path, monkeypatch: Any) -> None:
    source = tmp_path / "in"
    source.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"line 2 of .* is not JSON"):
        read_prompts(None, source)
    source.write_text('\n{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"line 2: .* neither 'prompt' nor 'messages'"):
        read_prompts(None, source)
    for text, prompts in (
        ("\ufeffone\x0cpage\r\n\nnext\u2028line\x85\n", ["one\x0cpage", "next\u2028line\x85"]),
        ('\ufeff{"prompt": "a\u2028b"}\r\n', ["a\u2028b"]),
        ('{"question": "a"}\n{"prompt": null}', ["a", None]),
        ("[INST] a [/INST]\n{b\n", ["[INST] a [/INST]", "{b"]),
        ("1\n", ["1"]),
    ):
        source.write_bytes(text.encode())
        assert [one.prompt for one in read_prompts(None, source)] == prompts
    source.write_text('\n{"id": 7, "prompt": "a", "key": 1}\n')
    assert read_prompts(None, source) == [Asked("a", 2, {"id": 7})]
    assert Asked("a", 2).name(0) == "line 2, prompt 0"
    named = tmp_path / "in.jsonl"
    named.write_text('"text"\n"other"\n')
    assert [one.prompt for one in read_prompts(None, named)] == ["text", "other"]
    source.write_bytes("a".encode("utf-16"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a".encode("utf-16"))))
    for given, name in ((source, str(source)), (Path("-"), "standard input")):
        with pytest.raises(ValueError, match=f"^{name} is not UTF-8: invalid start byte at byte 0"):
            read_prompts(None, given)
    if Path("/dev/zero").is_char_device():
        with pytest.raises(ValueError, match="/dev/zero is a device, expected a file"):
            read_prompts(None, Path("/dev/zero"))
    source.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(None, source)
    with pytest.raises(ValueError, match="both as arguments and by --input"):
        read_prompts(["a"], source)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\rb\nc")))
    assert [one.prompt for one in read_prompts(None, None)] == ["a\rb", "c"]


def test_prompts_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="PyArrow is not installed")
    from pyarrow import parquet

    source = tmp_path / "in.parquet"
    rows = [
        {"prompt": "a", "messages": None, "day": datetime.date(2026, 1, 2)},
        {"prompt": None, "messages": [{"role": "user", "content": "b"}], "day": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    conversation = [{"content": "b", "role": "user"}]
    assert read_prompts(None, source) == [
        Asked("a", 1, {"day": "2026-01-02"}),
        Asked(conversation, 2),
    ]
    parquet.write_table(pyarrow.table({"text": ["a"]}), source)
    with pytest.raises(ValueError, match=r"line 1: .* neither 'prompt' nor 'messages'"):
        read_prompts(None, source)
    source.write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match="Parquet"):
        read_prompts(None, source)


def test_one_bad_prompt_stops_no_other(capsys: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["Q: a", "", "Q: b", "Q: c", "Q: big? " * 1000]
    records = [{"prompt": prompt, "id": f"n{i}"} for i, prompt in enumerate(prompts)]
    source.write_text("\n" + "".join(map(json_line, records)))
    words = [*GENERATE, "--input", str(source), "--batch-size", "4", "--seed", "5"]
    status, _, errors = call(capsys, *words, "--output", str(output))
    assert status == 1
    assert "line 3, prompt 1: the prompt is empty" in errors
    assert "2 of 5 not answered: line 3, prompt 1, line 6, prompt 4" in errors
    made = {record["index"]: record for record in lines(output)}
    assert [made[i]["id"] for i in range(5)] == ["n0", "n1", "n2", "n3", "n4"]
    assert [i for i in range(5) if "error" in made[i]] == [1, 4]
    # The same tokens as alone; once more changes nothing, and still says so.
    assert call(capsys, *GENERATE, "--seed", "5", "Q: a")[1] == made[0]["texts"][0] + "\n"
    before = output.read_bytes()
    assert call(capsys, *words, "--output", str(output))[0] == 1
    assert output.read_bytes() == before
    status, out, errors = call(capsys, *words)
    assert status == 1
    assert "[3] Q: c" in out
    status, out, _ = call(capsys, *words, "--jsonl")
    assert status == 1
    assert ["error" in json.loads(line) for line in out.splitlines()] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "option",
    [["--top-k", "0"], ["--seed", str(2**64)], ["--max-new-tokens", "99999"], ["--stop", ""]],
)
def test_a_wrong_option_is_no_prompts_fault(capsys: Any, tmp_path: Path, option: list[str]) -> None:
    """One sentence, and not one for each of ten thousand prompts."""
    output = tmp_path / "o.jsonl"
    search = ["search", "--model", "demo", "--reward", "json", "--n", "2", "--iterations", "1"]
    for command in (["generate"], *([] if option[0] == "--top-k" else [search])):
        status, _, errors = call(capsys, *command, "Q:", *option, "--output", str(output))
        assert (status, "not answered" in errors, "Q:" in errors) == (1, False, False)
        assert output.read_bytes() == b""


def test_a_record_says_what_made_it(capsys: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = [*GENERATE, "--rule", "knapsack", "--output", str(output), "Q: a"]
    assert call(capsys, *words)[0] == 0
    (one,) = lines(output)
    run = one["run"]
    assert (run["rule"], run["param"], run["do_sample"]) == ("knapsack", 0.9, True)
    assert run["models"]["base"]["dtype"] == "float32"
    assert len(run["models"]["proxy"]["fingerprint"]) == 32
    assert {"tta_ext", "torch", "transformers"} <= set(run)
    # Without --seed the file's stands.
    assert "1 were there" in call(capsys, *words)[2]
    assert call(capsys, *words, "--dtype", "bfloat16")[0] == 0
    assert [record["seed"] for record in lines(output)] == [one["seed"]] * 2


def test_a_bad_problem_counts_as_wrong(capsys: Any, tmp_path: Path) -> None:
    data, report = tmp_path / "d.jsonl", tmp_path / "r.json"
    prompts = ["Q: a", "", "Q: b"]
    data.write_text("".join(json_line({"prompt": p, "answer": "x"}) for p in prompts))
    words = ["eval", "threshold:0.4", "--mode", "greedy", "--max-new-tokens", "2", "--data",
             str(data), "--output", str(report)]  # fmt: skip
    status, _, errors = call(capsys, *words)
    assert status == 1
    assert "line 2, problem 1: the prompt is empty" in errors
    (row,) = json.loads(report.read_text())
    assert (row["n"], row["failed"], row["outcomes"]) == (3, 1, [0, 0, 0])
    assert row["run"]["seed"] == 0
    # The report is ours, and may be written again.
    assert call(capsys, *words)[0] == 1


def test_config(capsys: Any, tmp_path: Path) -> None:
    file, toml = tmp_path / "c.yaml", tmp_path / "c.toml"
    file.write_text("prompts: [Q, 7]\nmax-new-tokens: 3\ngreedy: true\neval: {n: 1}\n")
    toml.write_text('max_new_tokens = 9\n[generate]\nprompts = "Q"\ngreedy = true\n')
    status, out, _ = call(capsys, "generate", "--config", str(file))
    assert status == 0
    assert out == call(capsys, *GENERATE, "--greedy", "Q", "7")[1]
    # What is on the command line goes first.
    status, out, _ = call(capsys, "generate", "--config", str(toml), "--max-new-tokens", "3")
    assert out == call(capsys, *GENERATE, "--greedy", "Q")[1]
    for text, message in (
        ("max-tokens: 3", "tta generate has no option 'max-tokens'"),
        ("config: x", "has no option 'config'"),
        ("critical: split", "rule threshold does not use --critical"),
        ("max-new-tokens: 3\nmax_new_tokens: 4", "is given twice"),
        ("greedy: 1", "greedy is 1, expected true or false"),
        ("stop: [true]", "stop is True, expected a number or a text"),
        ("seed: {a: 1}", "seed is {'a': 1}, expected"),
        ("- a", "is not a table of options"),
        ("a: [", "cannot be read"),
    ):
        file.write_text(text)
        status, _, errors = call(capsys, "generate", "--config", str(file), "Q")
        assert status == 1
        assert message in errors
    file.write_text("seed: few\n")
    assert call(capsys, "generate", "--config", str(file), "Q")[0] == 2
    file.write_text(
        "set: {alpha: 0.9, n: 4}\nreward: json\nmodel: /nowhere\nquantization-config: {a: 1}\n"
    )
    assert "no folder" in call(capsys, "search", "--config", str(file), "Q")[2]
    file.write_text("a: 1\nbench: {b: 2}\neval: {c: 3}")
    assert config.read(file, "bench", {"bench": 0, "eval": 0}) == {"a": 1, "b": 2}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_a_config(name: str, capsys: Any, tmp_path: Path) -> None:
    """What is wrong in the file is said before anything is done."""
    file = tmp_path / "c.toml"
    file.write_text("no-such-option = 1\n")
    status, _, errors = call(capsys, name, "--config", str(file))
    said = "unrecognized arguments" if name == "bench" else f"tta {name} has no option 'no-such-op"
    assert (status > 0, said in errors) == (True, True)


def test_config_of_the_benchmarks(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("stems: [nothing]\nquick: true\nrecord: false\n")
    status, _, errors = call(capsys, "bench", "--config", str(file))
    assert (status, "unknown stem 'nothing'" in errors) == (2, True)
    file.write_text("bench: {speed: 3}\n")
    status, _, errors = call(capsys, "bench", "--config", str(file))
    assert (status, "unrecognized arguments: --speed" in errors) == (2, True)


def test_the_citation_is_of_this_version() -> None:
    file = Path(__file__).resolve().parent.parent / "CITATION.cff"
    found = config.read(file, "", {})
    assert found["version"] == __version__
    assert found["license"] == "Apache-2.0"


def test_a_terminal_is_not_commanded(capsys: Any, monkeypatch: Any) -> None:
    text = "a\tb\x1b]0;title\x07\r\x9b2J\n:smile: [bold]"
    common.echo(text)
    assert capsys.readouterr().out == text + "\n"
    terminal = Console(force_terminal=True, no_color=True)
    monkeypatch.setattr(common, "console", terminal)
    common.echo(text, "red")
    shown = "a\tb\\x1b]0;title\\x07\\r\\x9b2J\n:smile: [bold]\n"
    assert capsys.readouterr().out == shown


def test_progress_in_a_log(capsys: Any, monkeypatch: Any) -> None:
    """Lines come by the clock, whether or not anything was finished."""
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(seconds)))
    meter = progress.Meter("answers", 6, done=2)
    happens = iter([lambda: None, lambda: meter(1), lambda: meter(1, 600), lambda: meter(2, 600)])

    class Clock:
        def wait(self, seconds: float) -> bool:
            assert seconds == progress.SECONDS_A_LINE
            step = next(happens, None)
            return step is None or bool(step())

    progress.tell(meter, Clock())  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [
        "answers 2/6, 0:00:10",
        "answers 3/6, 0:00:20",
        "answers 4/6, 0:00:30, 20 tokens/s, 0:01:00 left",
    ]
    with progress.progress("answers", 2) as advance:
        advance(2, 40)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("answers 2/2, ")
    assert "tokens/s" in line
    assert "left" not in line


def test_a_bar_leaves_stdout_alone(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(progress, "errors", Console(stderr=True, force_terminal=True))
    with progress.progress("answers", 2) as advance:
        print("result")
        advance(2, 8)
    assert capfd.readouterr().out == "result\n"


def test_tables_lose_nothing(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(common, "console", Console(width=20))
    table = common.table("label", "a long column", "another")
    table.add_row("best_of_n:group=16", "0.123456789", "-12.5")
    common.show_table(table)
    (_, row) = capsys.readouterr().out.splitlines()
    assert row.split() == ["best_of_n:group=16", "0.123456789", "-12.5"]


def test_errors_of_other_code_say_where(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def reward(p, r):\n    return len(3)\n")
    space: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    with pytest.raises(TypeError) as found:
        space["reward"]([], [])
    assert common.sentence(found.value) == (
        "TypeError: object of type 'int' has no len() (mine.py:2)"
    )
    with pytest.raises(ValueError) as told:
        common.check_output(path)
    assert common.sentence(told.value).endswith("it is kept")


@pytest.mark.parametrize("command", [GENERATE, SEARCH])
def test_shards_merge_into_what_one_run_writes(
    capsys: Any, tmp_path: Path, command: list[str]
) -> None:
    prompts = ["Q: a", "Q: b", "Q: c", "Q: d", "Q: e"]
    words = [*command, *prompts, "--seed", "7", "--output"]
    parts = [str(tmp_path / f"{i}.jsonl") for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        assert call(capsys, *words, part, "--shard", f"{i}/2")[0] == 0
    one, merged = tmp_path / "one.jsonl", tmp_path / "merged.jsonl"
    assert call(capsys, *words, str(one))[0] == 0
    status, _, errors = call(capsys, "merge", parts[0], "--output", str(merged))
    assert status == 1
    assert "2 of 5 are missing, at 1, 3, of the run" in errors
    assert not merged.exists()
    assert call(capsys, "merge", *parts, "--output", str(merged))[0] == 0
    runs = [[one | {"timing": 0, "curve": 0} for one in lines(path)] for path in (merged, one)]
    assert runs[0] == runs[1]
    assert "0 answered, 5 were there" in call(capsys, *words, str(merged))[2]
    assert "expected i/n" in call(capsys, *words, str(one), "--shard", "3/2")[2]
    assert "--shard needs --seed" in call(capsys, *command, "Q", "--shard", "1/2")[2]


def test_parts_by_torchrun(capsys: Any, tmp_path: Path) -> None:
    words = [*GENERATE, "Q: a", "Q: b", "Q: c", "--seed", "7", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    part, one, merged = (str(tmp_path / name) for name in ("{shard}", "one.jsonl", "merged.jsonl"))
    command = [*torchrun, "2", "-m", "tta_ext.cli", *words, part, "--shard", "env"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    parts = [str(tmp_path / number) for number in "12"]
    assert call(capsys, "merge", *parts, "--output", merged)[0] == 0
    assert call(capsys, *words, one)[0] == 0
    assert lines(Path(merged)) == lines(Path(one))


def test_shards_of_evaluations_and_comparisons(capsys: Any, tmp_path: Path) -> None:
    evaluation = ["eval", "threshold:0.4", "--mode", "greedy", "--n", "5", "--batch-size", "2",
                  "--max-new-tokens", "3", "--journal"]  # fmt: skip
    search = ["compare", "--model", "demo", "--reward", "letter:s", "--samples", "2", "--method",
              "best_of_n:group=2", "--max-new-tokens", "2", "Q: a", "Q: b", "Q: c",
              "--journal"]  # fmt: skip
    for words, count in ((evaluation, 3), (search, 3)):
        parts = [str(tmp_path / f"{words[0]}{i}") for i in (1, 2)]
        for i, part in enumerate(parts, 1):
            assert call(capsys, *words, part, "--shard", f"{i}/2")[0] == 0
        merged = tmp_path / f"{words[0]}.jsonl"
        assert call(capsys, "merge", *parts, "--output", str(merged))[0] == 0
        before = merged.read_bytes()
        assert before.count(b"\n") == count
        assert call(capsys, *words, str(merged))[0] == 0  # it has all that this run needs
        assert merged.read_bytes() == before

"""Files that the command writes: reports, pictures and journals, and whose they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import GENERATE, call, lines

from tta_ext.cli import common

REPORTS = [
    ["eval", "base", "--n", "1", "--mode", "greedy", "--max-new-tokens", "1", "--output"],
    ["trace", "Q:", "--max-new-tokens", "1", "--output"],
    ["compare", "--model", "demo", "--reward", "json", "--samples", "1", "--method",
     "best_of_n:group=1", "--max-new-tokens", "1", "Q:", "--output"],
]  # fmt: skip
JOURNALS = [
    [*GENERATE, "Q:", "--output"],
    [*REPORTS[0][:-1], "--journal"],
]


@pytest.mark.parametrize("words", REPORTS)
def test_a_report_replaces_reports_alone(capsys: Any, tmp_path: Path, words: list[str]) -> None:
    """Neither the finished work of another command, nor a file that names this library."""
    contents = [b'{"uses": "tta_ext", "run": {"tta": 1}}', b'[{"a": {"run": {"tta_ext": "0"}}}]']
    for journal in JOURNALS:
        path = tmp_path / "journal.jsonl"
        assert call(capsys, *journal, str(path))[0] == 0
        contents.append(path.read_bytes())
        path.unlink()
    path = tmp_path / "r.json"
    for content in contents:
        path.write_bytes(content)
        status, _, errors = call(capsys, *words, str(path))
        assert (status, "kept" in errors) == (1, True)
        assert path.read_bytes() == content
    path.unlink()
    for _ in range(2):  # its own is replaced
        assert call(capsys, *words, str(path))[0] == 0
    # And no run goes on from it.
    content = path.read_bytes()
    assert "kept" in call(capsys, *JOURNALS[0], str(path))[2]
    assert path.read_bytes() == content


def test_a_plot_replaces_plots_alone(capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tta_ext.plots import MARK, check_plot, new_figure, save

    for ending in ("pdf", "png", "svg"):
        path = tmp_path / f"p.{ending}"
        figure = new_figure()
        figure.savefig(path)  # somebody's own
        for content in (path.read_bytes(), b"tta_ext by matplotlib"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="it is kept"):
                common.check_output(path, MARK)
        save(figure, path)
        common.check_output(path, MARK)
    for name in ("p", "p.jpg", "p.txt"):
        with pytest.raises(
            ValueError, match=r"no ending of a picture, expected \.pdf, \.png, \.svg"
        ):
            check_plot(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
@pytest.mark.parametrize(
    "words",
    [
        REPORTS[0],
        [*REPORTS[0][:-1], "--plot"],
        REPORTS[1],
        [*REPORTS[1][:-1], "--html"],
        ["sweep", "--axis", "param=0.2", "--n", "1", "--mode", "greedy", "--max-new-tokens", "1",
         "--csv"],
    ],
)  # fmt: skip
def test_a_full_disk_is_told_with_the_file(capsys: Any, tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "full.png"
    path.symlink_to("/dev/full")
    status, _, errors = call(capsys, *words, str(path))
    assert status == 1
    assert f"No space left on device: '{path}'" in errors


@pytest.mark.parametrize("words", [["eval", "base", "argmax"], ["sweep", "--params", "0.2,0.4"]])
def test_pictures_of_evaluations(capsys: Any, tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.svg"
    words = [*words, "--n", "2", "--max-new-tokens", "1", "--plot", str(path)]
    for _ in range(2):  # the second replaces the first
        status, _, errors = call(capsys, *words)
        assert (status, f"written: {path}" in errors) == (0, True)
    assert path.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([*REPORTS[0][:-1], "--journal", "{0}", "--output", "{0}"], "--journal --output"),
        ([*REPORTS[0][:-1], "--journal", "{0}", "--output", "{1}"], "--journal --output"),
        ([*GENERATE, "--input", "{0}", "--output", "{0}"], "--input --output"),
        (["merge", "{0}", "--output", "{0}"], "shards --output"),
        (["generate", "Q:", "--config", "{0}", "--output", "{0}"], "--output --config"),
    ],
)
def test_one_file_has_one_use(capsys: Any, tmp_path: Path, words: list[str], names: str) -> None:
    (tmp_path / "same").touch()
    (tmp_path / "link").symlink_to("same")
    paths = [str(tmp_path / name) for name in ("same", "link")]
    status, _, errors = call(capsys, *(word.format(*paths) for word in words))
    assert (status, "are one file" in errors) == (1, True)
    assert all(name in errors for name in names.split())
    assert (tmp_path / "same").read_bytes() == b""


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "base", "--n", "1", "--output"],
        ["trace", "Q:", "--output"],
        ["compare", "--model", "demo", "--reward", "json", "Q:", "--output"],
        ["compare", "--model", "demo", "--reward", "json", "Q:", "--journal"],
        ["compare", "--model", "demo", "--reward", "json", "Q:", "--plot"],
        [*GENERATE, "Q:", "--output"],
    ],
)
def test_what_is_not_ours_is_kept(capsys: Any, tmp_path: Path, words: list[str]) -> None:
    for content in ('{"my": "precious data"}', "line one of my notes\nline two"):
        path = tmp_path / "mine.png"
        path.write_text(content)
        status, _, errors = call(capsys, *words, str(path))
        assert status == 1
        assert "kept" in errors
        assert path.read_text() == content


def test_a_record_that_was_changed_by_hand(capsys: Any, tmp_path: Path) -> None:
    """A sentence that names the file; nothing is decoded over it."""
    path = tmp_path / "j.jsonl"
    evaluation = [*JOURNALS[1], str(path)]
    comparison = [*REPORTS[2][:-1], "--journal", str(path)]
    for words, changes in (
        (evaluation, [{"stats": None}, {"stats": {"x": 1}}, {"texts": 5}, {"texts": []},
                      {"texts": [5]}]),
        (comparison, [{"reward": None}, {"curve": 3}, {"timing": ...}, {"index": ...}]),
        (["merge", str(path), "--output", str(tmp_path / "m")], [{"of": ...}, {"index": ...}]),
    ):  # fmt: skip
        path.unlink(missing_ok=True)
        assert call(capsys, *(comparison if words[0] == "merge" else words))[0] == 0
        record = lines(path)[0]
        for change in changes:
            kept = {key: value for key, value in (record | change).items() if value is not ...}
            path.write_text(json.dumps(kept) + "\n")
            status, _, errors = call(capsys, *words)
            assert (status, "j.jsonl has a record that is not whole" in errors) == (1, True)


def test_a_prompt_of_a_file_is_one_prompt(capsys: Any, tmp_path: Path) -> None:
    """A number is no token id, an object no message, alone as among others."""
    path = tmp_path / "in.jsonl"
    for text in ("5", '{"role": "user", "content": "a"}', "[5, true]"):
        path.write_text(f'{{"prompt": {text}}}\n')
        status, out, errors = call(
            capsys, *GENERATE, "--seed", "0", "--jsonl", "--input", str(path)
        )
        assert (status, "line 1, prompt 0: the prompt " in errors) == (1, True)
        assert "error" in json.loads(out)
    for text in ('{"answer": "a"}', '{"prompt": "a", "answer": null}'):
        path.write_text(f"\n{text}\n")
        status, _, errors = call(capsys, "eval", "base", "--data", str(path))
        assert (status, f"line 2 of {path}" in errors) == (1, True)


def test_outputs_are_tried_before_the_work(tmp_path: Path) -> None:
    common.check_output(tmp_path / "new" / "r.json")
    assert list((tmp_path / "new").iterdir()) == []
    common.check_output(Path(os.devnull))
    (tmp_path / "blank").write_text(" " * (1 << 16))  # quickly, however many there are
    with pytest.raises(ValueError, match="it is kept"):
        common.check_output(tmp_path / "blank")
    with pytest.raises(OSError, match="directory"):
        common.check_output(tmp_path)


def test_reports_are_strict_json(tmp_path: Path) -> None:
    common.write_report(tmp_path / "r", {"a": float("nan"), "b": [-float("inf")]})
    read = json.loads((tmp_path / "r").read_text(), parse_constant=pytest.fail)
    assert read == {"a": None, "b": ["-Infinity"]}

"""Every block of code in the pages is run, or says what it needs that is not here.

A block's language is ``python``, ``sh`` or ``text`` (what something printed). The line above one
that cannot run on every machine is ``<!-- needs: WHAT -->``; such a block is compiled, and its
``tta`` commands are parsed. Python blocks of a page are one script, and so are its commands.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "hub/*/README.md") for path in ROOT.glob(pattern)
)
# How many blocks need what. A new one is a decision.
NEEDS = {
    "network": 3,  # installing
    "checkpoints": 6,
    "vllm": 4,
    "ray": 4,
    "slurm": 2,
    "smollm2": 3,
    "hub": 2,
    "checkout": 1,
}

_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>\w+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block; ``needs`` is "" where it runs anywhere."""

    language: str
    code: str
    needs: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(m["language"], m["code"], m["needs"] or "") for m in _BLOCK.finditer(text)]
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE)), f"{page}: a stray fence"
    return found


def those(language: str, needs: bool) -> list[Any]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if any(one.language == language and bool(one.needs) == needs for one in blocks(page))
    ]


def test_what_is_not_run_is_counted() -> None:
    every = [one for page in PAGES for one in blocks(page)]
    assert {one.language for one in every} == {"python", "sh", "text"}
    assert Counter(one.needs for one in every if one.needs) == NEEDS
    assert sum(not one.needs and one.language == "python" for one in every) >= 8


@pytest.mark.parametrize("page", those("python", needs=False))
def test_python(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    code = "\n".join(one.code for one in blocks(page) if one.language == "python" and not one.needs)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip() or "print(" not in code


@pytest.mark.parametrize("page", those("python", needs=True))
def test_python_that_needs_more_compiles(page: Path) -> None:
    for one in blocks(page):
        if one.language == "python" and one.needs:
            compile(one.code, str(page), "exec")


def commands(code: str) -> list[list[str]]:
    """The words of each ``tta`` command in a shell script, those after ``# then:`` too."""
    code = re.sub(r"(?m)(^|\s)#(?! then: ).*$", "", code.replace("\\\n", " "))
    words = shlex.shlex(code.replace("# then: ", ""), posix=True, punctuation_chars="&;|\n")
    words.whitespace, words.commenters, words.whitespace_split = " \t", "", True
    found = []
    for end, part in groupby(words, lambda word: word != "" and word[0] in "&;|\n"):
        one = list(part)
        if not end and "tta" in one:
            found.append(one[one.index("tta") + 1 :])
    return found


@pytest.mark.parametrize("page", those("sh", needs=False))
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one process: a second one would import torch and transformers anew."""
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    from tta_ext.cli.app import run

    monkeypatch.chdir(tmp_path)
    code = "".join(one.code for one in blocks(page) if one.language == "sh" and not one.needs)
    words = commands(code)
    assert len(words) == len(re.findall(r"(?m)^(?!#).*\btta\b", code))
    for one in words:
        assert run(one) == 0, one


@pytest.mark.parametrize("page", those("sh", needs=True))
def test_commands_that_need_more_parse(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option exists and takes such a value."""
    typer = pytest.importorskip("typer")
    from tta_ext.cli.app import app

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("rule: threshold\nparam: 0.4\n")

    group = typer.main.get_command(app)
    for one in blocks(page):
        if one.language != "sh" or not one.needs:
            continue
        for name, *words in commands(one.code):
            with group.make_context("tta", [name]) as context:
                group.get_command(context, name).make_context(name, words, parent=context)


def test_a_wrong_option_would_be_found() -> None:
    typer = pytest.importorskip("typer")
    from tta_ext.cli.app import app

    group = typer.main.get_command(app)
    ((name, *words),) = commands("tta eval base \\\n  --tusk gsm8k  # no such option\n")
    with (
        group.make_context("tta", [name]) as context,
        pytest.raises(Exception, match="--tusk"),
    ):
        group.get_command(context, name).make_context(name, words, parent=context)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell in a kernel; what it prints has the form of what the file shows."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (.[docs])")
    nbformat = pytest.importorskip("nbformat")
    for name in ("ipykernel", "pandas", "jinja2"):
        pytest.importorskip(name, reason=f"{name} is not installed (.[docs])")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    path = ROOT / "docs" / "quickstart.ipynb"
    stored, run = (nbformat.read(path, as_version=4) for _ in range(2))
    nbclient.NotebookClient(
        run, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert "<!DOCTYPE html>" in (tmp_path / "answer.html").read_text(encoding="utf-8")
    assert "<svg" in (tmp_path / "search.html").read_text(encoding="utf-8")
    for mine, shown in zip(run.cells, stored.cells, strict=True):
        if mine.cell_type == "code":
            said = [one.output_type for one in mine.outputs if one.get("name") != "stderr"]
            assert said == [one.output_type for one in shown.outputs], mine.source

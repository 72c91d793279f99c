"""The benchmarks themselves: inputs as described, checks that bite, figures that add up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_deferral,
    bench_knapsack,
    bench_shapes,
    checks,
    claims,
    eager,
    gpu_times,
    harness,
    scale,
)
from benchmarks.__main__ import STEMS, main
from benchmarks.data import SHAPES, language_model_logits, nucleus, shaped_pair
from benchmarks.grid import Grid

ROOT = Path(__file__).resolve().parent.parent


def test_rows_are_like_a_language_models() -> None:
    sizes = [nucleus(row) for row in language_model_logits(8, 128256, 0)]
    assert min(sizes) >= 20
    assert max(sizes) <= 400


def test_shapes_are_what_they_are_called() -> None:
    rows = {name: shaped_pair(name, 1, 128256, 0, torch.float32)[0][0] for name in SHAPES}
    assert nucleus(rows["language model"]) == 161
    assert 2300 <= nucleus(rows["peaked, 2400"]) <= 2500
    assert 2400 <= nucleus(rows["small model"], 0.7) <= 2550
    assert len(rows["constant"].unique()) == 1
    assert len(rows["two plateaus"].unique()) == 2
    assert int((rows["99.9% impossible"] > -torch.inf).sum()) == 128
    assert len(rows["ties"].unique()) < 200
    for width in (0.5, 1, 2.2, 4):
        name = f"Gaussian {width:g}".replace("0.", ".")
        assert rows[name].std().item() == pytest.approx(width, rel=0.02)


def test_the_page_about_scale_has_what_the_simulation_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scale.tables(scale.Machine())
    told = capsys.readouterr().out
    assert told.count("\n") > 40
    assert f"```text\n{told}```\n" in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_worst_cell_stands_beside_the_kind_one() -> None:
    def cell(shape: str, ratio: float, over_base: float) -> bench_shapes.Cell:
        call = "deferral_sample", shape, "float32", "knapsack .3"
        return bench_shapes.Cell(*call, ratio, over_base)

    kind, worst, both = (
        cell("language model", 0.6, 0.6),
        cell("ties", 0.8, 0.8),
        cell("Zipf", 0.7, 1.4),
    )
    assert bench_shapes.extremes([both, kind, worst], "deferral_sample") == (kind, worst, both)


def test_every_shape_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    main("shapes --rounds 1 --vocab 700 --shape constant ties --dtype bfloat16 --all".split())
    printed = capsys.readouterr().out
    for op in bench_shapes.PROMISES:
        for shape, dtype in (("language model", "float32"), ("ties", "bfloat16")):
            lines = [line for line in printed.splitlines() if line.startswith(f"| {op} ")]
            cells = [[part.strip() for part in line.split("|")] for line in lines]
            assert any(row[3:5] == [shape, dtype] for row in cells), (op, shape, dtype)


@pytest.mark.usefixtures("native")
def test_a_call_is_the_sum_of_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    main("calls --seconds 0.01".split())
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "deferral_" in line]
    assert len(rows) == 5
    for whole, *parts in ([float(cell) for cell in row[2:-1]] for row in rows):
        assert whole == pytest.approx(sum(parts[:4]), abs=0.25)  # each is rounded to a tenth


@pytest.mark.parametrize("stem", STEMS)
def test_every_operator_passes_its_check(stem: str) -> None:
    """Eager, reference and ours agree with float64."""
    rules = ("knapsack", "threshold", "confidence_bet")
    providers = ("eager", "reference", "ours")
    grid = Grid((700,), (3,), ("float32", "bfloat16"), rules, providers)
    rows = [row for case in STEMS[stem].cases(grid) for row in harness.run_case(case, 0.001)]
    assert rows
    for row in rows:
        assert row.error == ""
        assert 0 < row.us["best"] <= row.us["q20"] <= row.us["q50"] <= row.us["q80"]
        assert row.gb_per_s == pytest.approx(row.bytes / row.us["best"] * 1e-3)


def test_the_file_says_what_was_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deferral.md"
    arguments = "deferral --vocab 700 --batch 3 --seconds 0.001 --provider ours".split()
    arguments += "--rule threshold --dtype bfloat16".split()
    picture = tmp_path / "times.svg"
    assert main([*arguments, "--output", str(path), "--plot", str(picture)]) == 0
    assert all(text in picture.read_text() for text in ("tta_ext", "vocabulary"))
    with pytest.raises(ValueError, match="has no ending of a picture"):
        main([*arguments, "--plot", str(tmp_path / "times.txt")])
    assert main([*arguments, "--output", str(path), "--plot", str(picture)]) == 0  # its own
    for other in (path, picture):
        other.write_text("# Notes of someone else\n\ntta_ext\n")
        with pytest.raises(ValueError, match="it is kept"):
            main([*arguments, "--output", str(path), "--plot", str(picture)])
        assert other.read_text().startswith("# Notes")
    written = path.with_name("again.md")
    assert main([*arguments, "--output", str(written)]) == 0
    head, _, table = written.read_text().partition("\n| op ")
    assert head.startswith(f"# again\n\n`python -m benchmarks {' '.join(arguments)}")
    for fact in ("torch", "threads", "instruction set in use", "processor"):
        assert f"- {fact}: " in head
    rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:]]
    assert "deferral_sample" in {row[1] for row in rows}
    assert {tuple(row[2:6]) for row in rows} == {("threshold", "bfloat16", "3x700", "ours")}


def test_tables_are_even() -> None:
    text = harness.table(("a", "long name"), [("x|y", "1"), ("z",)])
    assert text.splitlines() == [
        "| a    | long name |",
        "| ---- | --------- |",
        "| x\\|y | 1         |",
        "| z    |           |",
    ]


def test_wrong_results_are_reported_and_not_timed() -> None:
    grid = Grid((500,), (2,), ("float32",), ("knapsack",), ("eager", "ours"))
    case = next(iter(bench_deferral.cases(grid)))
    case.providers["ours"] = lambda: torch.zeros(2, 500, dtype=torch.bool)
    told: list[str] = []
    rows = harness.run_case(case, 0.001, told.append)
    by_name = {row.provider: row for row in rows}
    assert "masks differ" in by_name["ours"].error
    assert by_name["ours"].us == {}
    assert by_name["eager"].us
    assert len(told) == 1


def test_checks_bite() -> None:
    p = torch.softmax(torch.randn(3, 50, dtype=torch.float64), -1)
    assert checks.distribution("ours", p, p) == ""
    assert "total variation" in checks.distribution("ours", p.roll(1, -1), p)
    token = torch.tensor([1, 2, 3])
    assert checks.tokens("ours", token, token, p) == ""
    assert "differ" in checks.tokens("ours", token + 1, token, p)
    assert checks.tokens("eager", token + 1, token, p) == ""
    impossible = p.clone()
    impossible[0, 1] = 0
    assert "probability zero" in checks.tokens("eager", token, token, impossible)
    assert "relative error" in checks.values("eager", p * 1.1, p)


def test_eager_knapsacks() -> None:
    """The baselines solve the same problem: enumeration by hand."""
    profit, weight = torch.tensor([[4.0, 3.0, 9.0, 1.0]]), torch.tensor([[2.0, 1.0, 9.0, 0.0]])
    for capacity, want in ((3.0, [1, 1, 0, 1]), (2.0, [0, 1, 0, 1]), (0.0, [0, 0, 0, 1])):
        column = torch.tensor([[capacity]], dtype=torch.float64)
        assert eager.greedy_knapsack(profit, weight, column).int().tolist() == [want]
    profit, weight, capacity = bench_knapsack.items(2, 1000, 0)
    exact = eager.greedy_knapsack(profit, weight, capacity[:, None])
    used = torch.where(exact, weight.double(), 0.0).sum(-1)
    assert bool((used <= capacity).all())


def test_measure_takes_turns_and_summarizes() -> None:
    order: list[str] = []
    timings = harness.measure(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, max_rounds=3
    )
    assert {timing.rounds for timing in timings.values()} == {harness.MIN_ROUNDS}
    assert set(order) == {"a", "b"}
    one = harness.summarize([2.0])
    assert (one.best, one.q50, one.rounds) == (2.0, 2.0, 1)
    many = harness.summarize([float(i) for i in range(11)])
    assert (many.q20, many.q50, many.q80) == (2.0, 5.0, 8.0)


def test_claims_know_their_bounds() -> None:
    low = claims.Claim("low", 0.5, 0.7, False, "x", "")
    high = claims.Claim("high", 100.0, 150.0, True, "x", "")
    assert low.holds
    assert not high.holds
    missed = ["(missed)" in line for line in claims.table_of([low, high]).splitlines()]
    assert missed == [False, False, False, True]


@pytest.mark.parametrize("name", ["claims", "shapes"])
def test_the_documentation_has_the_recorded_figures(name: str) -> None:
    def rows(page: str) -> list[list[str]]:
        lines = (ROOT / page).read_text().splitlines()
        return [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]

    recorded = rows(f"benchmarks/results/{name}.md")
    recorded = [row for row in recorded if row[2] != "-" * len(row[2])]
    assert len(recorded) > 1
    assert all(row in rows("docs/measured.md") for row in recorded)


def test_unknown_stem_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "expected one of" in capsys.readouterr().err


def test_every_call_that_is_timed_on_a_gpu_runs() -> None:
    """On the CPU, small."""
    for case in gpu_times.calls((2,), (130,), (12,), "cpu"):
        result = case.call()
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        assert all(t.numel() for t in tensors)


@pytest.mark.slow
def test_a_gpu_check_of_minutes_runs_dry(tmp_path: Path) -> None:
    """All but the device: steps in processes, lines, one table."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--minutes", "9", "--dry-run",
         "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lines.jsonl",
        "log.txt",
        "report.md",
    ]
    text = (tmp_path / "report.md").read_text()
    for expected in ("Nothing was wrong.", "limit us", "deferral_verify", "copy: ", "softmax us"):
        assert expected in text


def test_gpu_check_degrades_without_a_gpu(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    dry = subprocess.run(
        ["bash", str(script), "--dry-run", str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": os.environ.get("PYTHON", "python3")},
    )
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert not (tmp_path / "logs").exists()
    for expected in ("environment", "tests", "times", "nothing failed (dry run)"):
        assert expected in dry.stdout

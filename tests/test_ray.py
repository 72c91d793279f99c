"""Ray: the tokens of one process from any number of workers, and from workers that die."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from commands import call
from models import base_model

from benchmarks import bench_ray
from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN
from tta_ext.jobs import Here
from tta_ext.journal import Journal

PROMPTS = bench_ray.PROMPTS[:6]
OPTIONS: dict[str, Any] = {"seed": 3, "max_new_tokens": 4, "eos_token_id": []}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine, small; for two workers at a time."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    from tta_ext.engines.ray.workers import ray

    ray.init(
        include_dashboard=False, num_cpus=4, object_store_memory=100_000_000,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    # Workers do not find tests to import.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.shutdown()


def test_without_ray_a_sentence(monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("tta_ext.engines.ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="engine ray needs Ray: pip install"):
        importlib.import_module("tta_ext.engines.ray")


def test_an_engine_by_its_name() -> None:
    def reward(prompts: Any, answers: Any) -> list[float]:
        return [0.0] * len(answers)

    parts = base_model(), reward
    with pytest.raises(ValueError, match="engine is 'rays', expected 'ray' or a function"):
        AdaptiveImportanceSampling(*parts, engine="rays")
    with pytest.raises(ValueError, match="workers is 2, but only engine='ray' has workers"):
        BestOfN(*parts, workers=2)


def test_options_of_workers_are_of_ray_alone(capsys: Any) -> None:
    words = ["generate", "Q", "--seed", "1"]
    assert "--engine here does not use --workers" in call(capsys, *words, "--workers", "2")[2]
    assert "needs --output" in call(capsys, *words, "--engine", "ray")[2]
    words = ["search", "Q", "--reward", "letter:s", "--seed", "1"]
    assert "--engine here does not use --split" in call(capsys, *words, "--split", "prompts")[2]
    assert "needs --output" in call(capsys, *words, "--engine", "ray")[2]


class Failing:
    """A machine that cannot do places of 3 and above."""

    def facts(self) -> dict[str, Any]:
        return {"name": "failing"}

    def decode(self, what: int, places: list[int]) -> list[int]:
        if max(places) > 2:
            raise ValueError(f"place {max(places)}")
        return [what * place for place in places]


def test_workers_do_what_is_done_here(cluster: Any) -> None:
    from tta_ext.engines.ray import Workers

    jobs = [(10, [0, 1]), (20, [1, 2, 3])]
    expected = [(w, p, str(r)) for w, p, r in Here(Failing()).map(jobs)]
    assert expected == [(10, [0, 1], "[0, 10]"), (20, [1], "[20]"), (20, [2], "[40]"),
                        (20, [3], "place 3")]  # fmt: skip
    with Workers(Failing, 2) as crew:
        assert sorted((w, p, str(r)) for w, p, r in crew.map(jobs)) == expected
        assert crew.facts() == {"name": "failing"}
    with Workers(lambda: Failing().decode(1, [7]), 1) as crew, pytest.raises(ValueError) as told:
        crew.facts()  # an error in loading
    assert str(told.value) == "place 7"
    with pytest.raises(ValueError, match="workers is 0, expected at least 1"):
        Workers(Failing, 0)


def test_prompts_by_two_workers(cluster: Any, tmp_path: Path) -> None:
    """A file with half of the answers is gone on from."""
    from tta_ext.engines.ray import Decoder, map_prompts

    whole = bench_ray.load_pair().generate(PROMPTS, **OPTIONS)
    given: dict[str, Any] = {"tag": "pair", "batch_size": 2, "output": tmp_path / "a.jsonl"}
    told: list[int] = []
    for workers in (1, 2):
        found = map_prompts(
            bench_ray.load_pair, PROMPTS, workers=workers, progress=told.append, **given, **OPTIONS
        )
        assert [one["tokens"] for one in found] == whole.tokens
        assert [one["index"] for one in found] == list(range(6))
        lines = given["output"].read_text().splitlines(keepends=True)
        given["output"].write_text("".join(lines[:2]))
    assert told == [0, 2, 2, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="without tag"):
        map_prompts(bench_ray.load_pair, PROMPTS, seed=0, output=tmp_path / "b")
    decoder = Decoder(bench_ray.load_pair, **OPTIONS)
    batch = decoder({"prompt": PROMPTS[3:5], "index": [3, 4], "id": ["a", "b"]})
    assert batch["tokens"] == whole.tokens[3:5]
    assert batch["id"] == ["a", "b"]
    with pytest.raises(ValueError, match="no column 'index'"):
        decoder({"prompt": PROMPTS})


@pytest.mark.slow
def test_a_pipeline_of_ray_data(cluster: Any) -> None:
    """Answers of different lengths, and rows in any order."""
    data = pytest.importorskip("ray.data", reason="no Ray Data: pip install 'ray[data]'")
    from tta_ext.engines.ray import Decoder

    options = {"seed": 3, "max_new_tokens": 32}
    whole = bench_ray.load_pair().generate(PROMPTS, **options)
    assert len({len(tokens) for tokens in whole.tokens}) > 1
    rows = [{"prompt": prompt, "index": i} for i, prompt in enumerate(PROMPTS)]
    found = data.from_items(rows[::-1]).map_batches(
        Decoder, fn_constructor_kwargs={"load": bench_ray.load_pair, **options}, batch_size=2,
        compute=data.ActorPoolStrategy(size=2),
    ).take_all()  # fmt: skip
    found.sort(key=lambda row: row["index"])
    assert [list(row["tokens"]) for row in found] == whole.tokens
    assert [row["text"] for row in found] == whole.texts
    assert [row["prompt"] for row in found] == PROMPTS


@pytest.mark.parametrize("name", sorted(bench_ray.METHODS))
def test_rollouts_by_workers_that_die(cluster: Any, name: str) -> None:
    from tta_ext.engines.ray import Rollouts

    small = {"n": 8, "max_new_tokens": 4} | ({} if name == "AISP" else {"group": 8})
    whole = bench_ray.search_method(name).generate("Q: 2 + 3", seed=5, **small)
    with Rollouts(2, cell=2) as engine:
        method = bench_ray.search_method(name, engine)
        search = method.start("Q: 2 + 3", seed=5, **small)
        search.step()
        for pid in bench_ray.worker_pids():  # and with them the state of the search
            os.kill(pid, signal.SIGKILL)
        search.run()
        found = search.result()
        with pytest.raises(ValueError, match="another model or reward"):
            bench_ray.search_method(name, engine).start("Q", seed=0)
    assert bench_ray.same(found, whole) == (len(whole.candidates[0]),) * 2 + (True,)
    assert found.timing.reward_items == whole.timing.reward_items
    with pytest.raises(ValueError, match="cell is 0"):
        Rollouts(cell=0)


def test_workers_of_a_search_by_name(cluster: Any) -> None:
    small: dict[str, Any] = {"seed": 5, "n": 8, "max_new_tokens": 4}
    here = bench_ray.search_method("AISP")
    whole = here.generate("Q: 2 + 3", **small)
    named = AdaptiveImportanceSampling(
        here.model, here.reward, here.tokenizer, engine="ray", workers=2, **asdict(here.settings)
    )
    found = named.generate("Q: 2 + 3", **small)
    assert bench_ray.same(found, whole) == (len(whole.candidates[0]),) * 2 + (True,)


def records(path: Path) -> list[dict[str, Any]]:
    with Journal(path) as journal:
        found = [{k: v for k, v in r.items() if k not in ("stats", "timing", "curve")}
                 for r in journal.records.values()]  # fmt: skip
    return sorted(found, key=lambda record: json.dumps(record))


SEARCH = ["search", "--model", "demo", "--reward", "letter:s", "--seed", "5", "--method",
          "best-of-n", "--n", "4", "--max-new-tokens", "2", *PROMPTS[:2], "--output"]  # fmt: skip
COMMANDS = {
    "search": SEARCH,
    "generate": ["generate", *PROMPTS, "--seed", "7", "--max-new-tokens", "4", "--batch-size", "2",
                 "--output"],
    "eval": ["eval", "threshold:0.4", "base", "--n", "4", "--batch-size", "2",
             "--max-new-tokens", "3", "--journal"],
    "compare": ["compare", "--model", "demo", "--reward", "letter:s", "--samples", "2", "--method",
                "best_of_n:group=2", "--max-new-tokens", "2", *PROMPTS[:3], "--journal"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(cluster: Any, capsys: Any, tmp_path: Path, name: str) -> None:
    words, here, there = COMMANDS[name], tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    status, table, _ = call(capsys, *words, str(here))
    assert status == 0
    found = call(capsys, *words, str(there), "--engine", "ray", "--workers", "2")
    assert found[0] == 0, found[2]
    assert records(there) == records(here)
    if name == "eval":  # tables, apart from tokens a second
        cut = [[line.split()[:-1] for line in text.splitlines()] for text in (found[1], table)]
        assert cut[0] == cut[1]
    merged = tmp_path / "merged.jsonl"
    assert call(capsys, "merge", str(there), "--output", str(merged))[0] == 0
    places = [r.get("index", r.get("start")) for r in map(json.loads, merged.open())]
    assert places == sorted(places)


def test_a_search_whose_rollouts_workers_share(cluster: Any, capsys: Any, tmp_path: Path) -> None:
    there = [tmp_path / f"{workers}.jsonl" for workers in (1, 2)]
    for workers, path in zip("12", there, strict=True):
        words = [*SEARCH, str(path), "--engine", "ray", "--workers", workers]
        assert call(capsys, *words, "--split", "rollouts")[0] == 0
    assert records(there[0]) == records(there[1]) != []


@pytest.mark.slow
def test_ten_workers_killed(tmp_path: Path) -> None:
    """``tta generate --engine ray``, workers killed at ten random moments.

    Each time something new is in the file first, as a restart takes longer than an answer.
    """
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    rng, prompts = random.Random(0), bench_ray.PROMPTS
    words = ["generate", *prompts, "--seed", "7", "--max-new-tokens", "64", "--batch-size", "1"]
    command = [sys.executable, "-m", "tta_ext.cli", *words, "--output"]
    whole, kills, runs = tmp_path / "whole.jsonl", 0, 0
    subprocess.run([*command, str(whole)], check=True)
    while kills < 10:
        runs, seen = runs + 1, 0
        output = tmp_path / f"{runs}.jsonl"
        with subprocess.Popen(
            [*command, str(output), "--engine", "ray", "--workers", "2"]
        ) as process:
            while process.poll() is None:
                time.sleep(rng.uniform(0.0, 0.5))
                there = output.read_bytes().count(b"\n") if output.exists() else 0
                pids = bench_ray.worker_pids(process.pid) if kills < 10 else []
                if pids and seen < there < len(prompts):
                    os.kill(rng.choice(pids), signal.SIGKILL)
                    kills, seen = kills + 1, there
        assert process.returncode == 0
        assert records(output) == records(whole)

"""The folders of ``hub/`` as transformers loads them: ``generate(custom_generate=FOLDER)``."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import generates
import pytest
import torch
import transformers
from generates import plain
from models import proxy_model

import tta_ext

try:
    importlib.metadata.version("tta-ext")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("the folders require tta-ext, which is not installed", allow_module_level=True)

HUB = Path(__file__).resolve().parent.parent / "hub"
METHODS: dict[str, dict[str, Any]] = {
    "kad": {"proxy_model": proxy_model, "rule": "knapsack", "param": 0.4},
    "aisp": {
        "reward": lambda: lambda prompts, responses: [float(sum(ids)) for ids in responses],
        "n": 4,
        "iterations": 2,
        "sigma": 0.5,
    },
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' copies of remote code go to a folder of the test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))


def arguments(method: str) -> dict[str, Any]:
    return {name: x() if callable(x) else x for name, x in METHODS[method].items()} | {"seed": 3}


def through_folder(method: str, **options: Any) -> torch.Tensor:
    folder = str(HUB / method)
    return plain(custom_generate=folder, trust_remote_code=True, **arguments(method), **options)


def direct(method: str, **options: Any) -> torch.Tensor:
    function = getattr(tta_ext.hf, method)
    return plain(custom_generate=function, **arguments(method), **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_are_those_of_the_function(method: str) -> None:
    for options in ({}, {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}):
        assert torch.equal(through_folder(method, **options), direct(method, **options))
    assert not torch.equal(through_folder(method), plain())


def test_options_of_generate_reach_the_loop() -> None:
    class Sink:
        def __init__(self) -> None:
            self.said: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.said.append(value.tolist())

        def end(self) -> None:
            self.said.append("end")

    one = {name: value[:1] for name, value in generates.batch().items()}
    watermark = transformers.WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")
    mine, its = Sink(), Sink()
    options: dict[str, Any] = {**one, "watermarking_config": watermark, "min_new_tokens": 8}
    found = through_folder("kad", streamer=mine, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, direct("kad", streamer=its, **options))
    assert mine.said == its.said
    assert mine.said[-1] == "end"
    assert isinstance(found.result, tta_ext.decoding.Generation)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("guidance_scale", 2.0),
        ("output_scores", True),
        ("prompt_lookup_num_tokens", 3),
        ("synced_gpus", True),
        ("no_such_input", 1),
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(method: str, name: str, value: Any) -> None:
    said = []
    for call in (through_folder, direct):
        with pytest.raises(ValueError, match=name) as error:
            call(method, **{name: value})
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_runs_without_trust(method: str) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        plain(custom_generate=str(HUB / method), trust_remote_code=False, **arguments(method))

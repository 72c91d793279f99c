"""Files of AISP runs: whole or refused, and the run that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import base_model
from safetensors import safe_open
from safetensors.torch import save_file

from tta_ext.decoding import AdaptiveImportanceSampling

PROMPTS = [[5, 6, 7], [8, 9]]
KEY = "tta_ext.aisp"


def reward(prompts: list[Any], answers: list[Any]) -> list[float]:
    return [float(sum(answer) % 17) for answer in answers]


def method(**settings: Any) -> AdaptiveImportanceSampling:
    defaults: dict[str, Any] = {"n": 4, "iterations": 3, "max_new_tokens": 4, "eos_token_id": []}
    return AdaptiveImportanceSampling(base_model(), reward, **(defaults | settings))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    search = method().start(PROMPTS, seed=3, sequence=[7, 9])
    search.step()
    search.step()
    search.save(tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def rewrite(file: Path, spoil: Callable[[dict[str, Any]], Any], mean: Any = None) -> None:
    """Change a file's state, or its u."""
    with safe_open(file, "pt") as opened:
        state = json.loads(opened.metadata()[KEY])
        tensor = opened.get_tensor("mean")
    spoil(state)
    tensor = tensor if mean is None else mean(tensor)
    save_file({"mean": tensor}, file, metadata={KEY: json.dumps(state)})


def same(first: Any, second: Any) -> None:
    assert first.rewards == second.rewards
    assert [one.tokens for one in first.best] == [one.tokens for one in second.best]
    assert torch.equal(first.mean, second.mean)


# ---- what was asked is compared with what is there -------------------------------------------


def test_the_run_in_the_file_goes_on(file: Path) -> None:
    whole = method().generate(PROMPTS, seed=3, sequence=[7, 9])
    same(method().generate(PROMPTS, seed=3, sequence=[7, 9], checkpoint=file), whole)
    same(method().generate(PROMPTS, checkpoint=file), whole)  # with the file's own seed and ids


def test_a_run_may_be_made_longer_and_end_otherwise(file: Path) -> None:
    whole = method().generate(PROMPTS, seed=3, sequence=[7, 9], iterations=5)
    changes: dict[str, Any] = {"iterations": 5, "batch_size": 100, "reward_batch_size": 3,
                               "max_seconds": 1e6, "reward_target": 1e6}  # fmt: skip
    same(method().generate(PROMPTS, checkpoint=file, **changes), whole)
    with pytest.raises(ValueError, match="iterations is 3, but 5 are done already"):
        method().generate(PROMPTS, checkpoint=file)


@pytest.mark.parametrize(
    "asked",
    [{"seed": 4}, {"sequence": [7, 8]}, {"n": 8}, {"sigma": 0.3}, {"max_new_tokens": 5},
     {"temperature": 0.5}, {"coherence": 0.0}, {"eos_token_id": [3]}, {"lam_unit": "ess"}],
)  # fmt: skip
def test_another_run_is_refused(asked: dict[str, Any], file: Path) -> None:
    """In the call, or in the method's own settings; the file stays as it is."""
    before, (name,) = file.read_bytes(), asked
    with pytest.raises(ValueError, match=f"holds a run over another {name}; remove it or name"):
        method().generate(PROMPTS, checkpoint=file, **asked)
    if name not in ("seed", "sequence"):
        with pytest.raises(ValueError, match=f"holds a run over another {name}"):
            method(**asked).generate(PROMPTS, checkpoint=file)
    with pytest.raises(ValueError, match="holds a run over other prompts"):
        method().generate(PROMPTS[:1], checkpoint=file)
    assert file.read_bytes() == before


# ---- the state is checked whole --------------------------------------------------------------

FIELDS = ["settings", "sigma", "seed", "sequence", "iteration", "prompts", "encoded", "stopped",
          "candidates", "curves", "timing"]  # fmt: skip


def test_every_field_is_needed(file: Path) -> None:
    whole = file.read_bytes()
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()[KEY]).keys() == {*FIELDS, "format"}
    for name in FIELDS:
        for spoil in (lambda s, n=name: s.pop(n), lambda s, n=name: s.update({n: None})):
            file.write_bytes(whole)
            rewrite(file, spoil)
            with pytest.raises(ValueError, match="holds no AISP run that can go on"):
                method().resume(file)
    for inner in ("settings", "timing"):
        for spoil in (lambda s, n=inner: s[n].popitem(), lambda s, n=inner: s[n].update(x=1)):
            file.write_bytes(whole)
            rewrite(file, spoil)
            with pytest.raises(ValueError, match=f"{inner} has not the fields"):
                method().resume(file)


SPOILT: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s.update(iteration=99), "iteration is 99, and 3 were to be done"),
    (lambda s: s.update(iteration=-1), "iteration is -1"),
    (lambda s: s.update(iteration=1), "a curve has 2 iterations of 1"),
    (lambda s: s.update(iteration=3), "a curve has 2 iterations of 3"),
    (lambda s: s.update(iteration=2.0), "iteration of the state is 2.0"),
    (lambda s: s.update(iteration=True), "iteration of the state is True"),
    (lambda s: s.update(stopped=[]), "stopped has 0 entries for 2 prompts"),
    (lambda s: s.update(stopped=["", "", ""]), "stopped has 3 entries for 2 prompts"),
    (lambda s: s.update(stopped=["", "tired"]), "stopped has 'tired'"),
    (lambda s: s.update(candidates=[[]]), "candidates has 1 entries for 2 prompts"),
    (lambda s: s.update(candidates=[[], []]), "a prompt has 0 candidates, expected 8"),
    (lambda s: s.update(curves=[[], []]), "a curve has 0 iterations of 2"),
    (lambda s: s["curves"][0].pop(), "a curve has 1 iterations of 2"),
    (lambda s: s["candidates"][0][0].pop("reward"), "an entry of candidates has not the fields"),
    (lambda s: s["candidates"][0][0].update(reward="1"), "reward of an entry of candidates is '1'"),
    (lambda s: s["candidates"][1][2].update(tokens=[1, "2"]), "tokens of an entry of candidates"),
    (lambda s: s["curves"][1][0].update(samples=1.5), "samples of an entry of curves is 1.5"),
    (lambda s: s.update(sequence=[1]), "sequence has 1 entries for 2 prompts"),
    (lambda s: s.update(sequence=[1, "2"]), "sequence of the state is"),
    (lambda s: s.update(encoded=[[5]]), "encoded has 1 entries for 2 prompts"),
    (lambda s: s.update(encoded=[[5], ["a"]]), "encoded of the state is"),
    (lambda s: s.update(sigma=-1.0), "sigma is -1.0"),
    (lambda s: s.update(sigma=float("nan")), "sigma is nan"),
    (lambda s: s.update(seed="3"), "seed of the state is '3'"),
    (lambda s: s["settings"].update(n=0), "n is 0"),
    (lambda s: s["settings"].update(alpha="much"), "alpha of settings is 'much'"),
    (lambda s: s["timing"].update(total="long"), "total of timing is 'long'"),
    (lambda s: s.update(format=1), "has format 1, expected 3"),
    (lambda s: s.pop("format"), "has format None, expected 3"),
]


@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_a_spoilt_state_is_refused(number: int, file: Path) -> None:
    spoil, message = SPOILT[number]
    rewrite(file, spoil)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        method().resume(file)


@pytest.mark.parametrize(
    "mean",
    [lambda u: u.double(), lambda u: u.int(), lambda u: u.half(), lambda u: u * float("nan")],
)
def test_u_is_finite_and_float32(mean: Any, file: Path) -> None:
    rewrite(file, lambda state: None, mean)
    with pytest.raises(ValueError, match="u is not float32, or not finite"):
        method().resume(file)


def test_u_of_another_shape(file: Path) -> None:
    rewrite(file, lambda state: None, lambda u: u[:1].clone())
    with pytest.raises(ValueError, match="holds u of shape"):
        method().resume(file)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, "{"])
def test_metadata_that_is_no_state(text: str, file: Path) -> None:
    save_file({"mean": torch.zeros(2, 5, 32)}, file, metadata={KEY: text})
    with pytest.raises(ValueError, match="holds no AISP run"):
        method().resume(file)

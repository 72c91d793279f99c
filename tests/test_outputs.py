"""Tensors that are written: whose memory they may share, and what autograd learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import operator_arguments, operator_outputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tta_ext import dispatch, ops, rules
from tta_ext.schemas import OPS, OpSpec

names = pytest.mark.parametrize("name", sorted(OPS))


def tensors(spec: OpSpec, arguments: tuple[Any, ...]) -> Iterator[tuple[int, str, Tensor]]:
    for i, (name, value) in enumerate(zip(spec.inputs, arguments, strict=True)):
        if isinstance(value, Tensor) and value.numel():
            yield i, name, value


def run(backend: str, spec: OpSpec, arguments: tuple[Any, ...], outputs: dict[str, Tensor]) -> None:
    """``X.out`` as a backend has it."""
    if backend == "reference":
        dispatch._run(False, spec, arguments, list(outputs.values()))
        return
    try:
        spec.out(*arguments, **outputs)
    except RuntimeError as error:
        raise dispatch.translated(error) from None


def beside(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of two tensors, the second of which begins inside of the first one's memory."""
    size = one.numel() * one.element_size()
    begin = (size - 1) // 8 * 8
    room = torch.zeros(begin + max(size, other.numel() * other.element_size()) + 8).byte()
    first = room[:size].view(one.dtype).view(one.shape).copy_(one)
    end = begin + other.numel() * other.element_size()
    return first, room[begin:end].view(other.dtype).view(other.shape)


@names
def test_an_output_inside_an_argument_is_refused(backend: str, name: str) -> None:
    spec, arguments = OPS[name], operator_arguments(name)
    for output, shape in operator_outputs(name, arguments).items():
        for i, given, value in tensors(spec, arguments):
            if shape.numel() * shape.element_size() == value.numel() * value.element_size() <= 8:
                continue  # one element: inside is in place
            first, second = beside(value, shape)
            outputs = {**operator_outputs(name, arguments), output: second}
            changed = (*arguments[:i], first, *arguments[i + 1 :])
            with pytest.raises(ValueError, match=f"^{output} shares memory with {given}, exp"):
                run(backend, spec, changed, outputs)
            assert torch.equal(first, value), "nothing is written before it is refused"


@names
def test_an_output_inside_another_is_refused(backend: str, name: str) -> None:
    spec, arguments = OPS[name], operator_arguments(name)
    for one in spec.outputs:
        for other in spec.outputs[spec.outputs.index(one) + 1 :]:
            outputs = operator_outputs(name, arguments)
            outputs[one], outputs[other] = beside(outputs[one], outputs[other])
            with pytest.raises(ValueError, match=f"^{other} shares memory with {one}, expected"):
                run(backend, spec, arguments, outputs)


@names
def test_in_place_where_the_table_says_so_and_nowhere_else(backend: str, name: str) -> None:
    spec, arguments = OPS[name], operator_arguments(name)
    want = operator_outputs(name, arguments)
    run(backend, spec, arguments, want)
    seen = set()
    for result in spec.results:
        for i, given, value in tensors(spec, arguments):
            like = want[result.name]
            if value.numel() * value.element_size() != like.numel() * like.element_size():
                continue
            place = value.clone()
            outputs = operator_outputs(name, arguments)
            outputs[result.name] = place.view(like.dtype).view(like.shape)
            changed = (*arguments[:i], place, *arguments[i + 1 :])
            if given not in result.in_place:
                with pytest.raises(ValueError, match=f"{result.name} shares memory with {given},"):
                    run(backend, spec, changed, outputs)
                continue
            seen.add((result.name, given))
            run(backend, spec, changed, outputs)
            for got, right in zip(outputs.values(), want.values(), strict=True):
                assert torch.equal(got, right)
    listed = {(result.name, given) for result in spec.results for given in result.in_place}
    # A merge over its partial sums needs one shard; that is the next test.
    assert seen == listed - {("out", "partials")}


def test_a_merge_of_one_shard_in_place(backend: str) -> None:
    mean, part = torch.rand(2, 3, 4), torch.rand(1, 2, 3, 4)
    want = ops.control_merge(mean, part, 0.5)
    assert torch.equal(ops.control_merge(mean, part, 0.5, out=part[0]), want)
    assert torch.equal(part[0], want)


def test_rows_in_place_need_the_rows_themselves(backend: str) -> None:
    """Not one row for all, not rows that begin elsewhere."""
    proxy, wide = torch.rand(3, 8), torch.rand(4, 8)
    for base in (wide[:1].expand(3, 8), wide[1:]):
        with pytest.raises(ValueError, match=r"^out shares memory with base_logits, expected"):
            ops.deferral_probs(base, proxy, rule="threshold", param=0.3, out=wide[:3])


@pytest.mark.parametrize("given", ["position", "sequence", "rollout"])
def test_a_token_is_no_index(backend: str, given: str) -> None:
    """Kernels may write a row's token before they read its indices."""
    index = torch.tensor([3, 4, 5])
    arguments: dict[str, Any] = {"seed": 1, "position": 0, given: index}
    with pytest.raises(ValueError, match=f"^out shares memory with {given}, expected memory"):
        ops.categorical_sample(torch.rand(3, 8), **arguments, out=index)
    assert index.tolist() == [3, 4, 5]


def test_neighbours_are_no_overlap(backend: str) -> None:
    state = torch.zeros(3, 4, dtype=torch.int64)
    logits = torch.rand(4, 8)
    want = ops.categorical_sample(logits, seed=1, position=0)
    got = ops.categorical_sample(logits, seed=1, position=state[0], sequence=None, out=state[1])
    assert torch.equal(got, want)
    assert state[1].data_ptr() == got.data_ptr()


# ---------------------------------------------------------------------------- autograd


def public(name: str, arguments: tuple[Any, ...], outputs: dict[str, Tensor]) -> None:
    """The public function on an operator's arguments, into given tensors."""
    given = dict(zip(OPS[name].inputs, arguments, strict=True))
    if "rule" in given:
        given["rule"] = rules.RULE_NAMES[given["rule"]]
        given["critical"] = list(rules.CRITICAL)[given["critical"]]
    for inner in ("start", "stop", "partial"):
        given.pop(inner, None)
    if name == "prelogit_perturb":
        given |= outputs
    else:
        given["out"] = next(iter(outputs.values())) if len(outputs) == 1 else [*outputs.values()]
    getattr(ops, name)(**given)


@names
@pytest.mark.parametrize("call", ["public", "raw"])
def test_autograd_sees_every_write(backend: str, name: str, call: str) -> None:
    arguments = operator_arguments(name)
    outputs = operator_outputs(name, arguments)
    before = {output: tensor._version for output, tensor in outputs.items()}
    if call == "public":
        public(name, arguments, outputs)
    else:
        OPS[name].out(*arguments, **outputs)
    for output, tensor in outputs.items():
        assert tensor._version > before[output], output


def test_a_gradient_of_what_was_overwritten_is_an_error(backend: str) -> None:
    hidden, weight = torch.rand(2, 4), torch.rand(2, 4, requires_grad=True)
    loss = (weight * hidden).sum()
    ops.prelogit_perturb(
        hidden, torch.rand(1, 2, 4), step=0, row=0, sequence=0, rollout=0, iteration=0, sigma=1.0,
        seed=1, out=hidden,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@names
@pytest.mark.parametrize("call", ["public", "raw"])
def test_outputs_that_require_grad_are_refused(backend: str, name: str, call: str) -> None:
    arguments = operator_arguments(name)
    outputs = operator_outputs(name, arguments)
    for output, tensor in outputs.items():
        if not tensor.is_floating_point():
            continue
        tensor.requires_grad_()
        with pytest.raises(ValueError, match=r"requires grad, which .* pass .*\.detach\(\), or ca"):
            public(name, arguments, outputs) if call == "public" else OPS[name].out(
                *arguments, **outputs
            )
        with torch.no_grad():
            public(name, arguments, outputs)
        tensor.requires_grad_(False)
        assert not tensor.requires_grad, output


# ---------------------------------------------------------------------------- fake tensors


@names
@pytest.mark.parametrize("overload", ["default", "out"])
def test_real_and_meta_tensors_do_not_mix(name: str, overload: str) -> None:
    """What was never computed must not come out as a result."""
    spec, arguments = OPS[name], operator_arguments(name)
    outputs = operator_outputs(name, arguments) if overload == "out" else {}
    operator = getattr(getattr(torch.ops.tta_ext, name), overload)
    for i, given, value in tensors(spec, arguments):
        if i == (1 if name == "normal" else 0) and not outputs:
            continue  # it says where the call runs
        changed = (*arguments[:i], value.to("meta"), *arguments[i + 1 :])
        with pytest.raises((ValueError, RuntimeError), match=f"{given} is on meta, expected cpu"):
            operator(*changed, **outputs)
    everywhere = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    operator(*everywhere, **{n: x.to("meta") for n, x in outputs.items()})
    if outputs:
        with pytest.raises(
            (ValueError, RuntimeError), match=r"is on cpu, expected meta|is on meta"
        ):
            operator(*everywhere, **outputs)


@names
def test_public_operators_under_a_fake_mode(name: str) -> None:
    """Also after a real call with the same numbers, which are kept as real tensors."""
    arguments = operator_arguments(name)
    given = dict(zip(OPS[name].inputs, arguments, strict=True))
    if "rule" in given:
        given |= {"rule": rules.RULE_NAMES[given["rule"]], "param": 0.25}
        given["critical"] = list(rules.CRITICAL)[given["critical"]]
    for inner in ("start", "stop", "partial"):
        given.pop(inner, None)
    indices = ("seed", "position", "sequence", "rollout", "step", "row")
    given |= {index: 1 for index in indices if index in given}
    if name == "normal":
        given["n"] = 10
    real = getattr(ops, name)(**given)
    mode = FakeTensorMode()
    fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
    with mode:
        inside = getattr(ops, name)(**fake)
    for found in [inside] if name == "normal" else [inside, getattr(ops, name)(**fake)]:
        pair = [(x,) if isinstance(x, Tensor) else x for x in (found, real)]
        for one, other in zip(*pair, strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_transforms_of_functions(native: None) -> None:
    logits = torch.rand(3, 8)
    want = ops.categorical_sample(logits, seed=1, position=0)

    def draw(x: Tensor) -> Tensor:
        return ops.categorical_sample(x, seed=1, position=0)

    assert torch.equal(torch.func.functionalize(draw)(logits), want)
    assert torch.equal(torch.vmap(draw)(torch.stack((logits, logits))), torch.stack((want, want)))

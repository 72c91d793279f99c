"""``tta value``: train a value function on a model's own answers and their rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tta_ext.cli import common
from tta_ext.cli.common import errors
from tta_ext.cli.config import Config
from tta_ext.cli.progress import progress
from tta_ext.cli.prompts import read_prompts
from tta_ext.cli.search import (
    SMOLLM2,
    Model,
    RewardName,
    chosen_reward,
    load_model_and_tokenizer,
)

__all__ = ["value"]


def value(
    context: typer.Context,
    reward: RewardName,
    output: Annotated[Path, typer.Option(help="Safetensors file for the value function.")],
    prompts: common.Prompts = None,
    model: Model = SMOLLM2,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the answers.")] = 30,
    temperature: common.Temperature = 1.0,
    max_new_tokens: common.MaxNewTokens = 32,
    source: common.Source = None,
    chat: common.Chat = False,
    system: common.System = None,
    seed: Annotated[int, typer.Option(help="Seed of answers and training.")] = 0,
    batch_size: common.BatchSize = 64,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    attn_implementation: common.Attention = None,
    quantization_config: common.Quantization = None,
    revision: common.Revision = None,
    threads: common.Threads = None,
    config: Config = None,
) -> None:
    """Train a value function on answers that the model draws, for re_control and args.

    Use it as --method re_control:value=FILE or args:value=FILE of tta compare and tta search. Says
    how much better than the mean it foretells rewards on prompts that it has not seen.
    """
    from tta_ext.decoding.search.value import MARK, train_value

    common.check_output(output, MARK)
    asked = read_prompts(prompts, source, chat, system)
    scorer = chosen_reward(reward)
    loaded, tokenizer = load_model_and_tokenizer(model, **common.loading_options(context))
    done = 0
    with progress("prompts", len(asked)) as advance:

        def count(prompts: int) -> None:
            nonlocal done
            advance(prompts - done, 0)
            done = prompts

        head = train_value(
            loaded,
            scorer,
            [one.prompt for one in asked],
            tokenizer,
            n=n,
            width=width,
            epochs=epochs,
            seed=seed,
            progress=count,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    head.save(output)
    facts = head.facts
    errors.print(
        f"written: {output}; {facts['samples']} answers scored in {facts['seconds']:.0f} s; mean "
        f"square error on held-out prompts {facts['held_out_error']:.4g}, of their mean "
        f"{facts['held_out_variance']:.4g}"
    )

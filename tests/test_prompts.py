"""Checks of prompts and of what belongs to them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from models import VOCABULARY, base_model, make_model

from tta_ext.decoding.runtime import models
from tta_ext.decoding.runtime.prompts import check_prompts, sequence_ids


def test_facts_about_a_model() -> None:
    model = make_model(vocabulary=VOCABULARY + 5)
    assert models.embedding_count(model) == models.logit_count(model) == VOCABULARY + 5
    assert models.device_of(model) == torch.device("cpu")
    assert models.position_limit(model) == 512
    model.config = transformers.BloomConfig()  # positions without a limit
    assert models.position_limit(model) is None
    check_prompts(model, [[5] * 600], 1)


def test_ids_and_positions() -> None:
    last = VOCABULARY - 1
    check_prompts(base_model(), [[0, last], [], [5] * 503], 10)
    for wrong in (-1, VOCABULARY):
        message = f"prompt 1 has the id {wrong}, expected ids from 0 to {last} for proxy"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_prompts(base_model(), [[5], [5, wrong, 6]], 10, "proxy")
    message = "prompt 0 has 504 tokens and max_new_tokens is 10, but the model has only 512 pos"
    with pytest.raises(ValueError, match=message):
        check_prompts(base_model(), [[5] * 504], 10)


def test_sequence_ids() -> None:
    assert sequence_ids(None, 3) == [0, 1, 2]
    assert sequence_ids(torch.tensor([7, 2]), 2) == [7, 2]
    with pytest.raises(ValueError, match="sequence has 2 ids, expected 3"):
        sequence_ids([1, 2], 3)

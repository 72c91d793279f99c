"""Deferral in SGLang against our own loop, token for token, on its CPU path.

``python -m benchmarks.sglang_equality`` in an environment with SGLang (:file:`.ci/engines` makes
one) and this package installed. Base and proxy are the shipped ones.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tta_ext.decoding import KnapsackDeferral, load_tokenizer
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems

from .harness import check_files, report, table

SEED, NEW, REQUESTS = 7, 32, 12
RULES: tuple[dict[str, Any], ...] = (
    {"rule": "threshold", "param": 0.4},
    {"rule": "confidence_bet", "param": 0.2},
)
ENGINE: dict[str, Any] = {
    "model_path": str(ASSETS / "base"),
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "enable_custom_logit_processor": True,
    "mem_fraction_static": 0.1,
    "log_level": "error",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    check_files(args.output)
    os.environ["TTA_EXT_SGLANG_PROXY"] = str(ASSETS / "proxy")
    import sglang

    from tta_ext.engines.sglang import request

    own = KnapsackDeferral.from_pretrained(str(ASSETS / "base"), str(ASSETS / "proxy"))
    tokenizer = load_tokenizer(str(ASSETS / "base"))
    prompts = [tokenizer(one.prompt)["input_ids"] for one in evaluation_problems(REQUESTS)]
    engine = sglang.Engine(**ENGINE)
    rows, wrong = [], 0
    try:
        for rule in RULES:
            for sample in (False, True):
                sampling = {"temperature": 1.0 if sample else 0.0, "max_new_tokens": NEW}
                made = [
                    request(
                        sampling,
                        **{f"tta_{key}": value for key, value in rule.items()},
                        tta_seed=SEED,
                        tta_sequence=i,
                    )
                    for i in range(REQUESTS)
                ]
                found = engine.generate(
                    input_ids=prompts,
                    sampling_params=[one["sampling_params"] for one in made],
                    custom_logit_processor=[one["custom_logit_processor"] for one in made],
                )
                wanted = own.generate(
                    prompts, do_sample=sample, seed=SEED, max_new_tokens=NEW, **rule
                ).tokens
                equal = sum(
                    list(one["output_ids"]) == tokens
                    for one, tokens in zip(found, wanted, strict=True)
                )
                label = f"{REQUESTS} requests, {rule['rule']}, {'sampled' if sample else 'greedy'}"
                rows.append((label, f"{equal} of {REQUESTS}"))
                print(f"  {label}: {equal} of {REQUESTS}", flush=True)
                wrong += equal != REQUESTS
    finally:
        engine.shutdown()
    command = ["python -m benchmarks.sglang_equality", *sys.argv[1:]]
    report(command, table(("what", "equal"), rows), args.output)
    print(f"{len(rows) - wrong} passed, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

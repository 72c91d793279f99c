"""The folder that makes two models one for vLLM; made without vLLM."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from tta_ext.decoding.runtime.loading import load_tokenizer
from tta_ext.decoding.runtime.stopping import end_ids
from tta_ext.decoding.runtime.vocabulary import align_vocabularies
from tta_ext.engines.vllm.arguments import PROCESSED
from tta_ext.engines.vllm.plugin import ARCHITECTURE

__all__ = ["PROCESSOR", "serve_command", "write_pair"]

PROCESSOR = "tta_ext.engines.vllm.processor_v1:KnapsackDeferral"

# Weights as vLLM's loader finds them.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write_pair(base: str | Path, proxy: str | Path, out: str | Path) -> Path:
    """Write the folder of a pair: configuration, tokenizer, and links to the base's weights.

    Args:
        base, proxy: folders with safetensors, or hub names.
        out: a folder that does not exist or is empty.

    Returns:
        ``out``, to be given to vLLM as its model.

    Raises:
        ValueError: a folder without safetensors, vocabularies that differ, or ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, expected a new folder")
    folders = [_folder(name) for name in (base, proxy)]
    configs = [AutoConfig.from_pretrained(folder, trust_remote_code=False) for folder in folders]
    tokenizers = [load_tokenizer(str(folder)) for folder in folders]
    sizes = [config.get_text_config().vocab_size for config in configs]
    vocabulary = align_vocabularies(*sizes, *tokenizers)
    weights = [path for pattern in _WEIGHTS for path in sorted(folders[0].glob(pattern))]
    out.mkdir(parents=True, exist_ok=True)
    for path in weights:
        os.symlink(path.resolve(), out / path.name)
    settings: dict[str, Any] = json.loads((folders[0] / "config.json").read_text())
    settings |= {
        "architectures": [ARCHITECTURE],
        "tta_base": str(folders[0].resolve()),
        "tta_proxy": str(folders[1].resolve()),
        "tta_vocabulary": [vocabulary.size, list(vocabulary.masked)],
    }
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # What ends an answer in our own loop, and no sampling defaults, which would be refused.
    ends = sorted(end_ids(None, [_Configured(folder) for folder in folders], tokenizers))
    GenerationConfig(eos_token_id=ends).save_pretrained(out)
    own, aligned = tokenizers
    if not own.chat_template:
        own.chat_template = aligned.chat_template
    own.save_pretrained(out)
    return out


def serve_command(pair: str | Path, options: Sequence[str] = ()) -> list[str]:
    """The command that serves a pair over vLLM's OpenAI interface, with more of vLLM's options.

    Its second model runner draws in the model; the processor here is the first one's, which is
    therefore asked for.
    """
    return [
        "env",
        "VLLM_USE_V2_MODEL_RUNNER=0",
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(pair)),
        *("--logits-processors", PROCESSOR, "--logprobs-mode", PROCESSED),
        *options,
    ]


def _folder(name: str | Path) -> Path:
    folder = Path(name)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(name)))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no safetensors, which vLLM loads")
    return folder


class _Configured:
    """A model's configurations without the model."""

    def __init__(self, folder: Path) -> None:
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            self.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError:
            self.generation_config = GenerationConfig.from_model_config(self.config)

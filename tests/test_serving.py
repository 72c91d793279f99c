"""transformers' OpenAI server with deferral behind it, asked by the openai client."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tta_ext.decoding import KnapsackDeferral
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems

for needed in ("fastapi", "uvicorn", "accelerate"):
    pytest.importorskip(needed, reason="no server: pip install 'tta-ext[serve]'")
openai = pytest.importorskip("openai", reason="no client: pip install openai")

from tta_ext.serving import serve  # noqa: E402

PROMPTS = [one.prompt for one in evaluation_problems(3)]
TEMPLATE = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
RULE: dict[str, Any] = {"rule": "knapsack", "param": 0.7, "critical": "split"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped base with a chat template."""
    folder: Path = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(ASSETS / "base", folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return str(folder)


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve(
        base, str(ASSETS / "proxy"), host="127.0.0.1", port=port, device="cpu", background=True,
        **RULE,
    )  # fmt: skip
    try:
        made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        while not server.server.started:
            assert server._thread.is_alive()
            time.sleep(0.05)
        yield made
    finally:
        server.kill_server()


@pytest.fixture(scope="module")
def own(base: str) -> KnapsackDeferral:
    return KnapsackDeferral.from_pretrained(base, str(ASSETS / "proxy"), **RULE)


def wanted(own: KnapsackDeferral, prompt: Any, sample: bool) -> str:
    """Our own loop's answer under the seed that the server's request leaves to torch."""
    torch.manual_seed(5)
    return own.generate([prompt], do_sample=sample, max_new_tokens=24).texts[0]  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_completions(
    client: Any, own: KnapsackDeferral, base: str, stream: bool, sample: bool
) -> None:
    for prompt in PROMPTS:
        found = client.completions.create(
            model=base, prompt=prompt, max_tokens=24, seed=5, stream=stream,
            temperature=1.0 if sample else 0.0,
        )  # fmt: skip
        pieces = list(found) if stream else [found]
        text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        assert text == wanted(own, prompt, sample)
        assert len(pieces) > 3 or not stream


@pytest.mark.parametrize("stream", [False, True])
def test_chat(client: Any, own: KnapsackDeferral, base: str, stream: bool) -> None:
    messages = [{"role": "user", "content": "Tom has 9 eggs. Tom loses 3. How many eggs?"}]
    found = client.chat.completions.create(
        model=base, messages=messages, max_tokens=24, seed=5, stream=stream, temperature=0.0
    )
    if stream:
        text = "".join(piece.choices[0].delta.content or "" for piece in found if piece.choices)
    else:
        text = found.choices[0].message.content
    assert text == wanted(own, messages, False)

"""Model folders: what is read, what is never run, and one sentence for whatever is wrong."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import base_model, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

import tta_ext
from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN, KnapsackDeferral
from tta_ext.decoding.rewards import ClassifierReward
from tta_ext.decoding.runtime.loading import (
    LoadingOptions,
    load_classifier,
    load_model,
    load_tokenizer,
    reading,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def change(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | values))


def sharded(folder: Path, name: str = "part.safetensors") -> None:
    """Put the weights behind an index that names one file."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    table = dict.fromkeys(load_file(folder / "part.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": table})
    )


def test_models_and_tokenizers(folder: Path, classifier: Path) -> None:
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config.name_or_path == str(folder)
    torch.testing.assert_close(load_model(str(folder)).lm_head.weight, base_model().lm_head.weight)
    assert load_tokenizer(str(folder)).get_vocab() == make_tokenizer().get_vocab()
    assert load_classifier(str(classifier)).config.num_labels == 1
    sharded(folder)
    torch.testing.assert_close(load_model(str(folder)).lm_head.weight, base_model().lm_head.weight)


def test_options_reach_transformers(folder: Path, classifier: Path) -> None:
    """Of every method, by the same names."""
    for made in (
        KnapsackDeferral.from_pretrained(
            str(folder), str(folder), attn_implementation="eager", device_map="cpu", param=0.5
        ),
        BestOfN.from_pretrained(
            str(folder), lambda p, r: [0.0] * len(r), attn_implementation="eager", n=2
        ),
        ClassifierReward.from_pretrained(str(classifier), attn_implementation="eager"),
    ):
        model = made.base if isinstance(made, KnapsackDeferral) else made.model
        assert model.config._attn_implementation == "eager"
    pair = KnapsackDeferral.from_pretrained(
        str(folder), str(folder), proxy_loading={"attn_implementation": "eager"}
    )
    names = [model.config._attn_implementation for model in (pair.base, pair.proxies[0])]
    assert names == ["sdpa", "eager"]
    assert BestOfN.from_pretrained(str(folder), lambda p, r: [0.0], n=3).settings.n == 3
    with pytest.raises(ValueError, match="device is cpu and device_map is given"):
        load_model(str(folder), device="cpu", device_map="cpu")
    with pytest.raises(ValueError, match="cannot use device nowhere"):
        load_model(str(folder), device="nowhere")
    with pytest.raises(TypeError, match="'use_cache' is no option of loading, expected device_map"):
        load_model(str(folder), use_cache=False)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Unknown quantization type"):
        load_model(str(folder), quantization_config={"quant_method": "of no kind"})


ROWS = [[5, 6, 7], [8, 9]]


def answers(model: Any) -> list[Any]:
    """Of deferral and of a search on one model."""
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": [], "seed": 0}
    kad = KnapsackDeferral(model, model, rule="knapsack", param=0.5)
    search = AdaptiveImportanceSampling(
        model, lambda p, r: [float(len(set(ids))) for ids in r], n=2, iterations=2
    )
    best = search.generate(ROWS, **options).best
    return [kad.generate(ROWS, **options).tokens, [one.tokens for one in best]]


@pytest.mark.parametrize("away", ["", "model.layers.1", "lm_head", "model.embed_tokens"])
def test_a_device_map_puts_layers_where_it_says(away: str, folder: Path, tmp_path: Path) -> None:
    """On the disk too, from where accelerate fetches them for each forward."""
    pytest.importorskip("accelerate")
    parts = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    device_map = dict.fromkeys([f"model.{part}" for part in parts] + ["lm_head"], "cpu")
    device_map |= {away: "disk"} if away else {}
    model = load_model(str(folder), device_map=device_map, offload_folder=str(tmp_path / "off"))
    assert getattr(model, "hf_device_map", device_map) == device_map  # none without accelerate
    assert bool(away) == any(weight.is_meta for weight in model.parameters())
    assert answers(model) == answers(load_model(str(folder)))


def test_a_model_offloaded_by_its_owner(folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = load_model(str(folder))
    expected = answers(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(weight.is_meta for weight in model.parameters())
    assert answers(model) == expected


def test_quantized_weights(folder: Path) -> None:
    """Deferral that keeps every token writes what ``generate`` does on the same weights."""
    torchao = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = load_model(str(folder), quantization_config=config)
    kad = KnapsackDeferral(model, model, rule="threshold", param=0.0)
    assert type(kad.base.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    ids = torch.tensor(ROWS[:1])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found = kad.generate(ROWS[:1], do_sample=False, max_new_tokens=6, eos_token_id=[])
    assert found.tokens[0] == expected[0, 3:].tolist()


def test_revisions_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """A repository in the hub's cache; its files are looked at like a folder's."""
    repo = tmp_path / "cache" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    for name, digit in (("main", "1"), ("wide", "2")):
        (repo / "refs" / name).write_text(digit * 40)
        shutil.copytree(folder, repo / "snapshots" / (digit * 40))
    make_model(hidden_size=16).save_pretrained(repo / "snapshots" / ("2" * 40))
    hub: LoadingOptions = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert load_model("some/model", **hub).config.hidden_size == 32
    assert load_model("some/model", revision="wide", **hub).config.hidden_size == 16
    assert len(load_tokenizer("some/model", **hub)) == len(make_tokenizer())
    sharded(repo / "snapshots" / ("1" * 40), "plain.bin")
    with pytest.raises(ValueError, match=r"some/model holds weights in plain\.bin"):
        load_model("some/model", **hub)


# ---- code of a folder ------------------------------------------------------------------------

MARK = "open({!r}, 'w').close()\n"


def plant(folder: Path, marker: Path, where: str) -> None:
    """Code in a folder that transformers would run if it were allowed to."""
    (folder / "evil.py").write_text(MARK.format(str(marker)) + "class Evil: pass\n")
    if where == "tokenizer":
        change(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.Evil", None]},
            tokenizer_class="EvilTokenizer",
        )
        return
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    change(
        folder / "config.json",
        auto_map=dict.fromkeys(names, "evil.Evil"),
        model_type="evil" if where == "config" else json.loads(
            (folder / "config.json").read_text())["model_type"],
    )  # fmt: skip


@pytest.mark.parametrize("where", ["config", "model", "tokenizer"])
@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_code_of_a_folder_is_never_run(
    where: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever standard input says: the marker is not there, and nobody asked."""
    path = request.getfixturevalue("folder" if kind == "model" else "classifier")
    plant(path, tmp_path / "ran", where)
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    load = load_model if kind == "model" else load_classifier
    # Transformers may have a class of its own for what the folder names; then that one is taken.
    own = (where, kind) in {
        ("model", "model"),
        ("model", "classifier"),
        ("tokenizer", "classifier"),
    }
    with nullcontext() if own else pytest.raises(ValueError, match="needs code of its own"):
        load(str(path))
        load_tokenizer(str(path))
    assert not (tmp_path / "ran").exists()
    assert answers.tell() == 0


def test_trust_is_not_taken(folder: Path) -> None:
    for load in (load_model, load_tokenizer, load_classifier):
        with pytest.raises(TypeError, match="code of a model's folder is never run"):
            load(str(folder), trust_remote_code=True)  # type: ignore[operator]


def test_no_place_trusts_code() -> None:
    """Every ``from_pretrained`` of an Auto class says what it trusts."""
    places = []
    root = Path(tta_ext.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                name = ast.unparse(node.func.value)  # type: ignore[attr-defined]
                if name == "kind" or name.startswith("Auto"):
                    given = {one.arg: ast.unparse(one.value) for one in node.keywords}
                    places.append((file.name, given.get("trust_remote_code")))
    assert {given for _, given in places} == {"False"}
    assert {file for file, _ in places} >= {"loading.py", "model_classes.py"}


def test_kernels_of_the_hub_are_code(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="some/kernel")
    with pytest.raises(ValueError, match="asks for the kernel some/kernel from the hub"):
        load_model(str(folder))
    assert load_model(str(folder), attn_implementation="sdpa").config.hidden_size == 32


# ---- files that are wrong --------------------------------------------------------------------


def no_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    """An index of safetensors that names a pickle, beside a file that would satisfy a glance."""
    torch.save(load_file(folder / "model.safetensors"), folder / "plain.bin")
    sharded(folder, "plain.bin")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def other_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lacks_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def index(content: str) -> Callable[[Path], Any]:
    return lambda folder: (sharded(folder), text(INDEX, content)(folder))


def setting(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: change(folder / "config.json", **values)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
INDEX = "model.safetensors.index.json"
FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (no_weights, r"holds no \.safetensors; weights in other formats"),
    (pickled, r"holds weights in plain\.bin; weights in other formats"),
    (lambda f: sharded(f, "../model/part.safetensors"), ""),
    (lambda f: sharded(f, "gone.safetensors"), r"has no file gone\.safetensors"),
    (index("{}"), "has no weight_map"),
    (index('{"weight_map": {"a": 3}}'), "weights in 3"),
    (setting(transformers_weights="model.bin"), r"holds weights in model\.bin"),
    (text("adapter_config.json", "{}"), r"holds no \.safetensors"),
    (cut, "is damaged: Error while deserializing header"),
    (text("model.safetensors", POINTER), "is a pointer of Git LFS"),
    (text("model.safetensors", "no model"), "is damaged"),
    (other_shape, r"it has lm_head\.weight of shape \[104, 32\] where \[105, 32\] is expected"),
    (lacks_one, r"it has no weights for model\.layers\.0\.mlp\.up_proj\.weight \(LlamaForCausal"),
    (text("config.json", "["), "is no JSON"),
    (text("config.json", "[" * 100_000), "is no JSON"),
    (text("config.json", "[]"), "holds no JSON object"),
    (text("config.json", "{}"), "cannot load a model from .*model_type"),
    (setting(model_type="of no kind"), "cannot load a model from .*of no kind"),
    (setting(model_type=7), "cannot load a model from"),
    (setting(hidden_size="thirty"), "cannot load a model from"),
    (setting(num_hidden_layers=None), "cannot load a model from"),
    (setting(num_attention_heads=0), "cannot load a model from"),
    (setting(rope_parameters=5), "cannot load a model from"),
    (setting(dtype="float33"), "cannot load a model from"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_of_a_model_are_one_sentence(number: int, folder: Path) -> None:
    spoil, message = FAULTS[number]
    spoil(folder)
    if not message:  # a path that leads back into the folder is one of its files
        assert load_model(str(folder)).config.hidden_size == 32
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_weights_outside_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    sharded(folder, "../other.safetensors")
    with pytest.raises(ValueError, match=r"takes weights from \.\./other\.safetensors, outside"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", "\x00"),
    ],
)
def test_faults_of_a_tokenizer_are_one_sentence(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_reward(folder: Path) -> None:
    """Its head would be drawn at random."""
    with pytest.raises(ValueError, match=r"it has no weights for score\.weight"):
        ClassifierReward.from_pretrained(str(folder))


def test_gguf(folder: Path, tmp_path: Path) -> None:
    """A suffix of any case, beside a configuration or not; what is no GGUF is called so."""
    upper = tmp_path / "up" / "MODEL.GGUF"
    upper.parent.mkdir()
    upper.write_bytes(b"no model")
    shutil.copy(folder / "config.json", upper.parent)
    for path in (upper, upper.parent):
        for load in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match=r"MODEL\.GGUF is no GGUF file"):
                load(str(path))
    upper.write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_model(str(upper))
    (upper.parent / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files; name one of them"):
        load_model(str(upper.parent))
    with pytest.raises(ValueError, match=r"there is no file .*x\.gguf"):
        load_model(str(tmp_path / "x.gguf"))
    with pytest.raises(ValueError, match="there is no folder"):
        load_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json and not exactly one \.gguf"):
        load_model(str(tmp_path / "empty"))


def test_what_is_no_fault_of_the_files() -> None:
    for kind in (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt):
        with pytest.raises(kind), reading("a model", "somewhere"):
            raise kind

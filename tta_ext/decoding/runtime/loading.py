"""Loading models from files that cannot run code: safetensors or GGUF.

The one place that calls ``from_pretrained`` of transformers. It never lets code of a model's folder
run (``trust_remote_code=False``: left out, transformers asks on standard input), looks at the files
that will be read before they are, and puts whatever is wrong with them into one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, TypedDict

import torch
from typing_extensions import Unpack

from tta_ext.decoding.runtime.model_classes import adapter_base, generating_class

__all__ = [
    "LoadingOptions",
    "load_classifier",
    "load_encoder",
    "load_model",
    "load_tokenizer",
    "reading",
]

_INDEX = ".safetensors.index.json"
# Where files come from, as opposed to what is made of them; tokenizers take these too.
_HUB = ("revision", "token", "cache_dir", "local_files_only")


class LoadingOptions(TypedDict, total=False):
    """What every ``from_pretrained`` hands to transformers as it is; None is as if left out."""

    device_map: Any
    max_memory: dict[int | str, int | str] | None
    offload_folder: str | None
    attn_implementation: str | None
    quantization_config: Any
    revision: str | None
    token: str | bool | None
    cache_dir: str | None
    local_files_only: bool


def load_model(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **options: Unpack[LoadingOptions],
) -> Any:
    """A causal language model in evaluation mode.

    Args:
        path: a folder, a ``.gguf`` file (dequantized) or a hub name.
        dtype: dtype of the weights; ``"auto"`` keeps the file's.
        device: where to put it; None leaves it on the CPU.
        options: see :class:`LoadingOptions`.

    Raises:
        TypeError: an option that is none of these.
        ValueError: there are no weights in safetensors or GGUF, some are missing, something is
            wrong with the files, they need code of their own, or there is no such device.
    """
    return _load(generating_class, "a model", path, dtype, device, options)


def load_classifier(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **options: Unpack[LoadingOptions],
) -> Any:
    """A sequence-classification model in evaluation mode; arguments as :func:`load_model`."""
    from transformers import AutoModelForSequenceClassification

    def kind(path: str, **hub: Any) -> Any:
        return AutoModelForSequenceClassification

    return _load(kind, "a reward model", path, dtype, device, options)


def load_encoder(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **options: Unpack[LoadingOptions],
) -> Any:
    """An encoder in evaluation mode, for its last hidden states; arguments as :func:`load_model`.

    Weights of a pooler, which these do not pass through, may be missing.
    """
    from transformers import AutoModel

    def kind(path: str, **hub: Any) -> Any:
        return AutoModel

    return _load(kind, "an encoder", path, dtype, device, options, unused="pooler.")


def load_tokenizer(path: str, **options: Unpack[LoadingOptions]) -> Any:
    """The tokenizer that belongs to a model.

    Args:
        path: as :func:`load_model`'s.
        options: as :func:`load_model`'s; those count that name the tokenizer's files.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    given = _given(options)
    hub = {name: given[name] for name in _HUB if name in given}
    folder, extra = _source(path)
    if Path(path).is_dir() and _there(Path(path), "tokenizer.json"):
        extra = {}
    base = adapter_base(path)
    if base is not None and not any(Path(path).glob("tokenizer*")):
        folder, extra = _source(base)
    with reading("a tokenizer", path):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra, **hub)


def _load(
    class_of: Callable[..., Any],
    what: str,
    path: str,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    options: LoadingOptions,
    unused: str | None = None,
) -> Any:
    given = _given(options)
    if device is not None and "device_map" in given:
        raise ValueError(f"device is {device} and device_map is given; pass one of them")
    try:
        torch.empty(0, device=device)  # before the weights are read
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"cannot use device {device}: {_line(error)}") from error
    folder, gguf = _source(path)
    if not gguf:
        _check_files(path, given)
    with reading(what, path):
        hub = {name: given[name] for name in _HUB if name in given}
        model, report = class_of(folder, **hub, **gguf).from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **(gguf or {"use_safetensors": True}),
            **given,
        )
        # Transformers would draw them at random.
        missing = [
            f"no weights for {name}"
            for name in sorted(report["missing_keys"])
            if unused is None or not name.startswith(unused)
        ]
        for name, found, expected in sorted(report["mismatched_keys"]):
            missing.append(f"{name} of shape {list(found)} where {list(expected)} is expected")
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"it has {', '.join(missing[:3])}{more} ({type(model).__name__})")
        if device is not None:
            model = model.to(device)
    model.config.name_or_path = path  # transformers names the folder of a .gguf file
    return model.eval()


def _given(options: LoadingOptions) -> dict[str, Any]:
    """The options that were given; ``TypeError`` for one that is not known."""
    known = LoadingOptions.__annotations__
    if "trust_remote_code" in options:
        raise TypeError(
            "trust_remote_code is not taken, as code of a model's folder is never run here; load "
            "the model with transformers and pass it to the constructor"
        )
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option of loading, expected {', '.join(known)}")
    return {name: value for name, value in options.items() if value is not None}


# ---- the files -------------------------------------------------------------------------------


def _source(path: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a folder, a hub name or a ``.gguf`` file."""
    file = Path(path)
    if file.suffix.lower() == ".gguf":
        if not file.is_file():
            raise ValueError(f"there is no file {path}")
        return _gguf(file)
    if file.is_dir():
        if not any(file.glob("*.safetensors")):
            found = [one for one in sorted(file.iterdir()) if one.suffix.lower() == ".gguf"]
            if len(found) == 1:
                return _gguf(found[0])
            if found:
                raise ValueError(f"{path} holds {len(found)} .gguf files; name one of them")
        if not (file / "config.json").is_file() and adapter_base(path) is None:
            raise ValueError(f"{path} holds no config.json and not exactly one .gguf file")
    elif file.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"there is no folder {path}")  # no hub name looks like that
    return path, {}


def _gguf(file: Path) -> tuple[str, dict[str, Any]]:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file} is no GGUF file: it does not begin as one")
    return str(file.parent), {"gguf_file": file.name}


def _check_files(path: str, given: Mapping[str, Any]) -> None:
    """Refuse a folder or hub name whose weights would be read from anything but safetensors.

    A folder may hold other formats too; what counts is what transformers will open, which an index
    or the configuration names. Of an adapter's folder its base's are looked at too.
    """
    base = adapter_base(path)
    if base is not None:
        _check_files(base, given)
        _check_format(path, [_there(Path(path), "adapter_model.safetensors")])
        return
    config = _json(path, "config.json", given)
    attention = str(config.get("attn_implementation", ""))
    if "/" in attention and "attn_implementation" not in given:
        raise ValueError(
            f"config.json of {path} asks for the kernel {attention} from the hub, which is code; "
            "pass attn_implementation='sdpa'"
        )
    weights = config.get("transformers_weights")
    if weights is None:
        names = ("model.safetensors", "model" + _INDEX)
        weights = next((name for name in names if _file(path, name, given)), None)
    files = [weights]
    if isinstance(weights, str) and weights.endswith(_INDEX):
        table = _json(path, weights, given).get("weight_map")
        if not isinstance(table, Mapping):
            raise ValueError(f"{weights} of {path} has no weight_map")
        files = sorted({*table.values()}, key=str)
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        files.append(_there(folder, "adapter_model.safetensors"))
    _check_format(path, files)


def _check_format(path: str, names: Iterable[Any]) -> None:
    """Refuse files, of a folder or hub name, that are no whole safetensors."""
    folder = Path(path)
    for name in names:
        if not (isinstance(name, str) and name.endswith(".safetensors")):
            holds = "no .safetensors" if name is None else f"weights in {name}"
            raise ValueError(
                f"{path} holds {holds}; weights in other formats than safetensors are not loaded, "
                "as reading them can run code"
            )
        if folder.is_dir():
            _check_safetensors(folder, name)


def _there(folder: Path, name: str) -> str | None:
    return name if (folder / name).is_file() else None


def _check_safetensors(folder: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()) and not file.is_symlink():
        raise ValueError(f"{folder} takes weights from {name}, outside of it")
    if not file.is_file():
        raise ValueError(f"{folder} has no file {name}, which its index names")
    with file.open("rb") as stream:
        if stream.read(12) == b"version http":
            raise ValueError(f"{file} is a pointer of Git LFS, no weights; run git lfs pull")
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {_line(error)}") from error


def _file(path: str, name: str, given: Mapping[str, Any]) -> Path | None:
    """A file of a folder, or of a hub repository; None if there is none."""
    if Path(path).is_dir():
        found = Path(path, name)
        return found if found.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    hub = {key: given[key] for key in _HUB if key in given}
    with reading("a model", path):
        try:
            return Path(hf_hub_download(path, name, **hub))
        except EntryNotFoundError:
            return None


def _json(path: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """An object from a JSON file; empty if there is no such file."""
    file = _file(path, name, given)
    if file is None:
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} of {path} is no JSON: {_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} of {path} holds no JSON object")
    return value


# ---- what is wrong ---------------------------------------------------------------------------


@contextmanager
def reading(what: str, path: str) -> Iterator[None]:
    """Turns whatever a model's files make transformers raise into a ``ValueError`` of one line.

    Files that are damaged, or hold values of wrong types, fail deep inside, with errors of every
    class. Memory that runs out is let through: it is no fault of the files.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = _line(error)
        if "trust_remote_code" in str(error):
            line = (
                "it needs code of its own, which is never run here; load it with transformers and "
                "pass the model"
            )
        elif not isinstance(error, (OSError, ValueError)) or not line:
            line = f"{type(error).__name__}: {line}".removesuffix(": ")
        raise ValueError(f"cannot load {what} from {path}: {line}") from error


def _line(error: BaseException) -> str:
    return shorten(str(error), 300, placeholder=" ...")

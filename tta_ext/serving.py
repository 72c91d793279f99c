"""transformers' own OpenAI server with deferral behind it: ``tta serve``.

For demonstrations and evaluation tools: one answer at a time, and one rule for all requests, whose
temperature, seed, length and stop strings are their own. This is the one place that knows how that
server loads its models. Needs ``pip install 'tta-ext[serve]'``.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from tta_ext import hf
from tta_ext.decoding.runtime.loading import load_model

__all__ = ["defer", "serve"]


def defer(model: Any, proxy: Any, **options: Any) -> Any:
    """The model itself, whose ``generate`` defers to a proxy from now on.

    Args:
        model: a causal language model.
        proxy: the aligned one.
        options: keywords of :func:`tta_ext.hf.kad`.
    """
    plain = model.generate

    @wraps(plain)
    def generate(*args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        kwargs |= options
        return plain(
            *args, custom_generate=hf.kad, proxy_model=proxy, token_streamer=streamer, **kwargs
        )

    model.generate = generate
    return model


def serve(
    base: str,
    proxy: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    dtype: str = "auto",
    device: str = "auto",
    background: bool = False,
    **options: Any,
) -> Any:
    """Serve a base that defers to a proxy, until interrupted.

    Args:
        base, proxy: folders or hub names.
        host, port: where to listen.
        dtype, device: of both models.
        background: return at once; the server runs in a thread until its ``kill_server()``.
        options: keywords of :func:`tta_ext.hf.kad` for every request.

    Raises:
        ImportError: transformers has no such server, or what it needs is missing.
    """
    try:
        from transformers.cli import serve as command
        from transformers.cli.serving import model_manager
    except ImportError as error:
        raise ImportError(
            f"transformers has no server here ({error}); pip install 'tta-ext[serve]'"
        ) from None

    module: Any = model_manager
    original = module.ModelManager

    class Deferring(module.ModelManager):
        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._load_model(*args, **kwargs)
            # As the interface has it: drawn unless a request's temperature is 0, from all tokens
            # unless the model's own file says otherwise.
            model.generation_config.do_sample = True
            if model.generation_config.top_k is None:
                model.generation_config.top_k = 0
            second = load_model(proxy, dtype=dtype, device=model.device)
            return defer(model, second, **options)

    module.ModelManager = Deferring
    try:
        return command.Serve(
            force_model=base,
            host=host,
            port=port,
            dtype=dtype,
            device=device,
            non_blocking=background,
        )
    finally:
        module.ModelManager = original

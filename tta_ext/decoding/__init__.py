"""Decoding with two models: loops, caches, prompts. Needs transformers (``tta-ext[hf]``)."""

from tta_ext.decoding.chat import Chat
from tta_ext.decoding.kad import KnapsackDeferral
from tta_ext.decoding.loading import load_model, load_tokenizer
from tta_ext.decoding.result import DecodeStats, Generation
from tta_ext.decoding.streaming import StreamEvent
from tta_ext.decoding.trace import TokenTrace
from tta_ext.decoding.vocabulary import Vocabulary, align_vocabularies

__all__ = [
    "Chat",
    "DecodeStats",
    "Generation",
    "KnapsackDeferral",
    "StreamEvent",
    "TokenTrace",
    "Vocabulary",
    "align_vocabularies",
    "load_model",
    "load_tokenizer",
]

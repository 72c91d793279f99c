"""Decoding: deferral between two models, search by reward. Needs transformers (``tta-ext[hf]``)."""

from tta_ext.decoding.aisp import AdaptiveImportanceSampling, AISPSearch, AISPSettings
from tta_ext.decoding.args import RewardGuidedSearch
from tta_ext.decoding.best_of_n import BestOfN
from tta_ext.decoding.chat import Chat
from tta_ext.decoding.chunk_beam import ChunkBeamSearch
from tta_ext.decoding.kad import KnapsackDeferral
from tta_ext.decoding.loading import load_model, load_tokenizer
from tta_ext.decoding.outcome import Candidate, IterationRecord, SearchResult, Timing
from tta_ext.decoding.result import DecodeStats, Generation
from tta_ext.decoding.streaming import StreamEvent
from tta_ext.decoding.trace import TokenTrace
from tta_ext.decoding.vocabulary import Vocabulary, align_vocabularies

__all__ = [
    "AISPSearch",
    "AISPSettings",
    "AdaptiveImportanceSampling",
    "BestOfN",
    "Candidate",
    "Chat",
    "ChunkBeamSearch",
    "DecodeStats",
    "Generation",
    "IterationRecord",
    "KnapsackDeferral",
    "RewardGuidedSearch",
    "SearchResult",
    "StreamEvent",
    "Timing",
    "TokenTrace",
    "Vocabulary",
    "align_vocabularies",
    "load_model",
    "load_tokenizer",
]

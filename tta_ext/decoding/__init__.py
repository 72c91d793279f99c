"""Decoding: deferral between two models, search by reward. Needs transformers (extra ``hf``)."""

from tta_ext.decoding.deferral.chat import Chat
from tta_ext.decoding.deferral.kad import KnapsackDeferral
from tta_ext.decoding.deferral.result import DecodeStats, Generation
from tta_ext.decoding.deferral.trace import TokenChoice, TokenTrace
from tta_ext.decoding.runtime.loading import load_model, load_tokenizer
from tta_ext.decoding.runtime.streaming import StreamEvent
from tta_ext.decoding.runtime.vocabulary import Vocabulary, align_vocabularies
from tta_ext.decoding.search.aisp import AdaptiveImportanceSampling, AISPSearch, AISPSettings
from tta_ext.decoding.search.best_of_n import BestOfN
from tta_ext.decoding.search.chunk_beam import ChunkBeamSearch
from tta_ext.decoding.search.outcome import Candidate, IterationRecord, SearchResult, Timing
from tta_ext.decoding.search.re_control import ReControlSearch
from tta_ext.decoding.search.reward_guided import RewardGuidedSearch
from tta_ext.decoding.search.value import ValueHead, load_value, train_value

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
    "ReControlSearch",
    "RewardGuidedSearch",
    "SearchResult",
    "StreamEvent",
    "Timing",
    "TokenChoice",
    "TokenTrace",
    "ValueHead",
    "Vocabulary",
    "align_vocabularies",
    "load_model",
    "load_tokenizer",
    "load_value",
    "train_value",
]

"""Contextual memory reweaving: what a model has read beyond its window, kept and read again.

The public names below are looked up on first use; the modules that need torch are imported then and not before.
"""

from typing import TYPE_CHECKING

from ai_sleep_constructs.reference.public import public_names

if TYPE_CHECKING:
    from ai_sleep_constructs.cmr.buffer import LayeredMemoryBuffer
    from ai_sleep_constructs.cmr.configuration import MemoryConfig
    from ai_sleep_constructs.cmr.entry import MemoryEntry, RetrievalContext
    from ai_sleep_constructs.cmr.full_model import FullCMRModel
    from ai_sleep_constructs.cmr.logit_cache import LogitCache
    from ai_sleep_constructs.cmr.matching import (
        ContextualRelevanceScorer,
        MemoryHierarchy,
        MultiCriteriaRanker,
        SemanticMemoryMatcher,
    )
    from ai_sleep_constructs.cmr.models import CMRTransformer, IntegratedCMRModel, MistralCMRModel
    from ai_sleep_constructs.cmr.optimization import CMRPerformanceOptimizer
    from ai_sleep_constructs.cmr.retrieval import AdvancedMemoryRetriever, RetrievalCache
    from ai_sleep_constructs.cmr.scoring import RelevanceScorer
    from ai_sleep_constructs.cmr.streaming import MemoryStream

__all__ = [
    "AdvancedMemoryRetriever",
    "CMRPerformanceOptimizer",
    "CMRTransformer",
    "ContextualRelevanceScorer",
    "FullCMRModel",
    "IntegratedCMRModel",
    "LayeredMemoryBuffer",
    "LogitCache",
    "MemoryConfig",
    "MemoryEntry",
    "MemoryHierarchy",
    "MemoryStream",
    "MistralCMRModel",
    "MultiCriteriaRanker",
    "RelevanceScorer",
    "RetrievalCache",
    "RetrievalContext",
    "SemanticMemoryMatcher",
]

_HOMES = {
    "AdvancedMemoryRetriever": "retrieval",
    "CMRPerformanceOptimizer": "optimization",
    "CMRTransformer": "models",
    "ContextualRelevanceScorer": "matching",
    "FullCMRModel": "full_model",
    "IntegratedCMRModel": "models",
    "LayeredMemoryBuffer": "buffer",
    "LogitCache": "logit_cache",
    "MemoryConfig": "configuration",
    "MemoryEntry": "entry",
    "MemoryHierarchy": "matching",
    "MemoryStream": "streaming",
    "MistralCMRModel": "models",
    "MultiCriteriaRanker": "matching",
    "RelevanceScorer": "scoring",
    "RetrievalCache": "retrieval",
    "RetrievalContext": "entry",
    "SemanticMemoryMatcher": "matching",
}

__getattr__, __dir__ = public_names(__name__, _HOMES)

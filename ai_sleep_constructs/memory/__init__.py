"""Text that is remembered, and the evidence in it found again. Importing this package imports no model library."""

from typing import TYPE_CHECKING

from ai_sleep_constructs.reference.public import public_names

if TYPE_CHECKING:
    from ai_sleep_constructs.memory.answers import ScoreError
    from ai_sleep_constructs.memory.code.context import CodeContext
    from ai_sleep_constructs.memory.code.system import CodeMemorySystem
    from ai_sleep_constructs.memory.embedding import minilm
    from ai_sleep_constructs.memory.judge import LLMJudge
    from ai_sleep_constructs.memory.llms import local_llm, openai_compatible_llm
    from ai_sleep_constructs.memory.results import Relevant, ScoredMemory
    from ai_sleep_constructs.memory.scoring import Scorer
    from ai_sleep_constructs.memory.store import Memory, MemoryStore
    from ai_sleep_constructs.memory.system import MemorySystem, NearDuplicateWarning

__all__ = [
    "CodeContext",
    "CodeMemorySystem",
    "LLMJudge",
    "Memory",
    "MemoryStore",
    "MemorySystem",
    "NearDuplicateWarning",
    "Relevant",
    "ScoreError",
    "ScoredMemory",
    "Scorer",
    "local_llm",
    "minilm",
    "openai_compatible_llm",
]

_HOMES = {
    "CodeContext": "code.context",
    "CodeMemorySystem": "code.system",
    "LLMJudge": "judge",
    "Memory": "store",
    "MemoryStore": "store",
    "MemorySystem": "system",
    "NearDuplicateWarning": "system",
    "Relevant": "results",
    "ScoreError": "answers",
    "ScoredMemory": "results",
    "Scorer": "scoring",
    "local_llm": "llms",
    "minilm": "embedding",
    "openai_compatible_llm": "llms",
}

__getattr__, __dir__ = public_names(__name__, _HOMES)

"""Text that is remembered, and the evidence in it found again. Importing this package imports no model library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from the module that defines it; AttributeError for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

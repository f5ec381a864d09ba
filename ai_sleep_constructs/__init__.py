"""A language model that sleeps: monitor it while it is awake, change it for real while it is asleep, measure every change.

The public names below are looked up on first use, so that importing the package is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai_sleep_constructs.reference.corpus import load_corpus
    from ai_sleep_constructs.reference.loading import load_model
    from ai_sleep_constructs.sleep import (
        AISleepController,
        HuggingFaceModelAdapter,
        LMModelState,
        LMPerformanceMonitor,
        OptimizationStrategy,
        PerformanceAlert,
        SleepCallback,
        SleepCoordinator,
        SleepMode,
        SleepService,
        SleepTrigger,
        StateSnapshot,
        configure_optimal_sleep_schedule,
        create_sleep_enabled_model,
    )
    from ai_sleep_constructs.sleep.head_surgery import save_pruned

__version__ = "0.1.0"

__all__ = [
    "AISleepController",
    "HuggingFaceModelAdapter",
    "LMModelState",
    "LMPerformanceMonitor",
    "OptimizationStrategy",
    "PerformanceAlert",
    "SleepCallback",
    "SleepCoordinator",
    "SleepMode",
    "SleepService",
    "SleepTrigger",
    "StateSnapshot",
    "configure_optimal_sleep_schedule",
    "create_sleep_enabled_model",
    "load_corpus",
    "load_model",
    "save_pruned",
]

_ELSEWHERE = {"load_corpus": "reference.corpus", "load_model": "reference.loading", "save_pruned": "sleep.head_surgery"}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from the module that defines it; AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'sleep')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A language model that sleeps: monitor it while it is awake, change it for real while it is asleep, measure every change.

The public names below are looked up on first use, so that importing the package is quick and does not import torch.
"""

from typing import TYPE_CHECKING

from ai_sleep_constructs.reference.public import public_names

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

__getattr__, __dir__ = public_names(__name__, {name: _ELSEWHERE.get(name, "sleep") for name in __all__})

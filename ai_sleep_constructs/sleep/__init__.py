"""Sleep for language models: modes and state, the monitor, the strategies, the controller and the model adapter.

The public names below are looked up on first use; the modules that need torch are imported then and not before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai_sleep_constructs.sleep.adapter import (
        HuggingFaceModelAdapter,
        configure_optimal_sleep_schedule,
        create_sleep_enabled_model,
    )
    from ai_sleep_constructs.sleep.controller import AISleepController
    from ai_sleep_constructs.sleep.coordinator import SleepCoordinator
    from ai_sleep_constructs.sleep.modes import OptimizationStrategy, SleepMode, SleepTrigger
    from ai_sleep_constructs.sleep.monitor import LMPerformanceMonitor, PerformanceAlert
    from ai_sleep_constructs.sleep.service import SleepService
    from ai_sleep_constructs.sleep.state import LMModelState, StateSnapshot
    from ai_sleep_constructs.sleep.trainer import SleepCallback

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
]

_HOMES = {
    "AISleepController": "controller",
    "HuggingFaceModelAdapter": "adapter",
    "LMModelState": "state",
    "LMPerformanceMonitor": "monitor",
    "OptimizationStrategy": "modes",
    "PerformanceAlert": "monitor",
    "SleepCallback": "trainer",
    "SleepCoordinator": "coordinator",
    "SleepMode": "modes",
    "SleepService": "service",
    "SleepTrigger": "modes",
    "StateSnapshot": "state",
    "configure_optimal_sleep_schedule": "adapter",
    "create_sleep_enabled_model": "adapter",
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported from the module that defines it; AttributeError for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(_HOMES)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

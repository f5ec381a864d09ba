"""Sleep for language models: modes and state, the monitor, the strategies, the controller and the model adapter.

The public names below are looked up on first use; the modules that need torch are imported then and not before.
"""

from typing import TYPE_CHECKING

from ai_sleep_constructs.reference.public import public_names

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

__getattr__, __dir__ = public_names(__name__, _HOMES)

"""What the tests of memories of code share."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ai_sleep_constructs.memory.code.system import CodeMemorySystem


def index(system: CodeMemorySystem, folder: Path, exclude: list[str] | None = None, **options: Any) -> list[str]:
    return system.index_repository(folder, exclude, progress=False, **options)


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)

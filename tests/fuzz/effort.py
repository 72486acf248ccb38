"""How hard to search: a few hundred examples in `make check`, minutes in `make chaos`.

`python -m tests.fuzz` raises `FUZZ_EFFORT` and gives each round a seed of its own; what a
round finds is shrunk and printed, and its seed finds it again.
"""

import os
from typing import Any

from hypothesis import HealthCheck, settings

EFFORT = int(os.environ.get("FUZZ_EFFORT", "1"))


def search(examples: int, **more: Any) -> settings:
    """Settings for a property that looks at so many examples in `make check`."""
    return settings(
        max_examples=examples * EFFORT,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **more,
    )

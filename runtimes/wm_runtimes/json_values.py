"""Values of reports as JSON holds them."""

import math
from collections.abc import Mapping
from typing import Any


def json_values(value: Any) -> Any:
    """Mappings as dicts, tuples as lists; numbers that are not finite, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

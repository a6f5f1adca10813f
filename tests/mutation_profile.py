"""A plugin of the runs of mutation.py: one thread, and hypothesis ends at the first example that fails, without making it small."""

from typing import Any

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "mutation",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)


def pytest_configure(config: Any) -> None:
    """After conftest.py: the tensors are tiny, and two threads would wait for each other."""
    import torch

    torch.set_num_threads(1)

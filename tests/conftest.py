import os
from importlib.util import find_spec

from hypothesis import HealthCheck, settings

# "ci" is the default everywhere, so that a failure seen in one place is seen in all; HYPOTHESIS_PROFILE=deep searches on.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if find_spec("torch") is not None:
    import torch

    torch.set_num_threads(2)  # sums split by threads: the same number gives the same bits on every machine

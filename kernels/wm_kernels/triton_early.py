"""Kernels that start before the one ahead of them in a stream has ended: programmatic dependent launch, from Hopper on.

Such a kernel has a constant DEPENDENT. Launched by libwm_kernels it begins while its predecessor is still running, reads what no kernel
writes, weights that is, and waits before it reads or writes anything else. Launched as Triton launches, it finds nothing to wait for.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Let the kernel behind this one begin too, then wait until all that was launched ahead has ended and written."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

"""The mode of the kernels' numerics; what it does to each op's kernels is tested beside them."""

import pytest

from wm_kernels import numerics
from wm_kernels.numerics import exact


def test_mode_holds_inside_the_block_alone():
    assert not exact()
    with numerics("exact"):
        assert exact()
        with numerics("fast"):
            assert not exact()
        assert exact()
    assert not exact()


def test_mode_ends_with_an_error_in_the_block():
    with pytest.raises(KeyError), numerics("exact"):
        raise KeyError
    assert not exact()


def test_unknown_mode_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^numerics: mode is 'precise', expected one of fast, exact$"), numerics("precise"):
        pass

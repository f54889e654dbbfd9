"""The laws of tests/kernels for the installed ops, on whatever device is there."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.tolerances import KERNEL_SSD

from tests.kernels import test_ssd_laws as ssd

# pytest finds these as if they were defined here; `kernel` calls the fixture below.
from tests.kernels.test_conv_laws import (
    kernel,  # noqa: F401
    test_any_rows_are_as_in_the_recurrence,  # noqa: F401
    test_chunking_is_invisible,  # noqa: F401
)


@pytest.fixture
def emulated_conv(ops):
    """Return what the laws of the convolution call: here, the installed ops."""
    return lambda source: ops


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KERNEL_SSD, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
def test_mixed_rows_are_as_in_the_recurrence(ops, fused, dtype):
    """Run packed and padded rows in pieces, forward and backward."""
    case = replace(ssd.mixed(fused), dtype=dtype)
    installed = SimpleNamespace(ssd_combined=ops, check_guards=lambda: None)
    found = ssd.errors(ssd.results(ssd.call_kernels, installed, case), case)
    assert max(found.values()) <= KERNEL_SSD[dtype], found

"""In the forks compat's hooks have nothing to mend; in the releases they have."""

import pytest
from support.stack import FORKS

import compat
from compat.families import delta, mamba1, mamba2, rwkv4, xlstm
from compat.hooks import switch

HELD = mamba1.PATCHED | {"rwkv": rwkv4.PATCHED, "xlstm": xlstm.PATCHED}
# The fork has the fused path with kernels alone, and no other rule; compat is faster on a CPU.
FASTER = {f"fused path of {name}": held for name, held in mamba2.PATCHED.items()}
FASTER |= {f"rule of {name}": held for name, held in delta.PATCHED.items()}


def states(report):
    return {status.library: status.state for status in report.libraries}


def test_the_forks_are_native():
    wanted = "native" if FORKS else "absent"
    # Many models of the released transformers continue from their cache.
    assert states(compat.status()) == {"transformers": "native", "sentence-transformers": wanted}
    # Native only where a kernel takes the states, which none does that is installed here.
    assert not compat.status().fused.startswith("native")


@pytest.mark.parametrize("name", HELD | FASTER)
def test_models_are_mended_in_the_forks(name):
    held = (HELD | FASTER)[name]
    with held:
        assert held.patched is (not FORKS or name in FASTER)


def test_enable_leaves_the_forks_alone():
    wanted = "native" if FORKS else "patched"
    try:  # The tests' own `compat.enable_vertical_chunking` does nothing on the forks.
        report = switch.enable_vertical_chunking()
        assert states(report) == dict.fromkeys(["transformers", "sentence-transformers"], wanted)
        assert {held.patched for held in HELD.values()} == {not FORKS}
        assert {held.patched for held in FASTER.values()} == {True}
    finally:
        switch.disable_vertical_chunking()

"""In the forks compat's hooks have nothing to mend; in the releases they have."""

import pytest
from support.stack import FORKS

import compat
from compat.families import mamba1, mamba2, rwkv4, xlstm
from compat.hooks import switch

HELD = mamba1.PATCHED | {"rwkv": rwkv4.PATCHED, "xlstm": xlstm.PATCHED}
HELD |= {f"fused path of {name}": held for name, held in mamba2.PATCHED.items()}


def states(report):
    return {status.library: status.state for status in report.libraries}


def test_the_forks_are_native():
    wanted = "native" if FORKS else "absent"
    # Many models of the released transformers continue from their cache.
    assert states(compat.status()) == {"transformers": "native", "sentence-transformers": wanted}
    assert compat.status().fused.startswith("native: use_fused_scan") is FORKS
    assert compat.status().cpu.startswith("native: use_fused_scan") is FORKS


@pytest.mark.parametrize("name", HELD)
def test_models_are_mended_in_the_forks(name):
    with HELD[name]:
        assert HELD[name].patched is not FORKS


def test_enable_leaves_the_forks_alone():
    wanted = "native" if FORKS else "patched"
    try:  # The tests' own `compat.enable_vertical_chunking` does nothing on the forks.
        report = switch.enable_vertical_chunking()
        assert states(report) == dict.fromkeys(["transformers", "sentence-transformers"], wanted)
        assert {held.patched for held in HELD.values()} == {not FORKS}
    finally:
        switch.disable_vertical_chunking()

"""`ci.kernels.registers`: what it compiles, and what it calls worse, without a compiler."""

import re

import pytest

from ci import forks
from ci.kernels import registers
from ci.kernels.registers import Kernel, Use

LOG = """
ptxas info    : Compiling entry function '_Z3oneI{0}Li128ELb1EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z3oneI{0}Li128ELb1EEvPT_
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


def test_what_ptxas_says():
    kernel = Kernel("a.cu", "one", "float", ("128", "true"))
    assert registers.parse("a.cu", LOG.format("f")) == {kernel: Use(40, 12)}
    with pytest.raises(ValueError, match="twice"):
        registers.parse("a.cu", 2 * LOG.format("f"))


@pytest.mark.parametrize("library", ["causal-conv1d", "mamba-ssm"])
def test_a_tree_alone_is_compiled_in_part_but_every_file_of_it(library):
    paths = sorted((forks.patched(library) / "csrc").rglob("*.cu*"))
    assert paths
    for path in paths:
        text = path.read_text()
        few = registers.leave_few(text)
        for pattern, most in [(r"^template void .*;$", 2), (r"selective_scan_\w+_launch<\d.*;", 1)]:
            before, after = (re.findall(pattern, source, re.M) for source in (text, few))
            assert bool(before) == bool(after)
            assert len(after) <= most, path


def test_worse_is_fewer_blocks_or_more_spills():
    old = Kernel("a.cu", "one", "float", ("128", "true"))
    new = old._replace(arguments=("128", "true", "false"))
    added = old._replace(arguments=("128", "true", "true"))
    assert registers.predecessor(new, {old: Use(40, 0)}) == old
    assert registers.predecessor(added, {old: Use(40, 0)}) is None
    assert not registers.is_worse(old, Use(33, 0), Use(40, 0))  # Registers come in eights.
    assert registers.is_worse(old, Use(40, 0), Use(41, 0))
    assert registers.is_worse(old, Use(40, 0), Use(40, 4))
    assert not registers.is_worse(old, Use(41, 0), Use(40, 4))
    uses = {new: Use(41, 0), added: Use(60, 0)}
    text, worse = registers.table("sm_80", {old: Use(40, 0)}, uses)
    assert worse == 1
    assert "| one | 128, true, false | float | 40 | 41 **worse** |" in text
    assert "| one | 128, true, true | float | new | 60 |" in text

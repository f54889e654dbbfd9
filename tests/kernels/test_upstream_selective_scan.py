"""The patches' own tests of the selective scan and of Mamba, on emulated kernels.

The files are read from the patched tree, and run as they are except for the device.
"""

import re

import pytest

from ci import forks
from tests.kernels.test_selective_scan import full

pytestmark = pytest.mark.slow
FILES = (
    "ops/test_selective_scan_last_state.py",
    "ops/test_selective_scan_misaligned.py",
    "ops/test_selective_scan_complex_groups.py",
    "ops/test_selective_scan_states.py",
    "modules/test_mamba_simple.py",
)


def _later(name):
    """Look up the patched tree's function when it is called, as kernels take a while to build."""

    def call(*args, **kwargs):
        module = full("patched")
        return getattr(module, name, getattr(module.mamba_simple, name, None))(*args, **kwargs)

    return call


try:
    folder = forks.patched("mamba-ssm") / "tests"
except forks.ForkError as reason:
    pytest.skip(str(reason), allow_module_level=True)
for file in FILES:
    if not (folder / file).exists():  # A request by itself brings one of them.
        continue
    text = (folder / file).read_text().replace('"cuda"', '"cpu"')
    imported = re.findall(r"^from mamba_ssm\S* import (.*)$", text, re.MULTILINE)
    text = re.sub(r"^from mamba_ssm\S* import .*$", "", text, flags=re.MULTILINE)
    namespace = {name: _later(name) for line in imported for name in line.split(", ")}
    exec(compile(text, str(folder / file), "exec"), namespace)
    tests = {name: test for name, test in namespace.items() if name.startswith("test_")}
    assert tests, f"found no tests in {folder / file}"
    globals().update(tests)

"""Upstream's own tests of causal-conv1d, on its emulated kernels, stock and patched.

Their file is read from the release or the patched tree, and run as it is except for the device and
for smaller sizes, which still cover whole blocks of channels and parts of one.
"""

import os
import re
import types

import pytest
import torch

from ci import forks

# Pairs of upstream's text and its replacement. Each must be found, or the file is not what is
# expected.
CHANGES = [
    (r'device = "cuda"', 'device = "cpu"'),
    (r"not torch\.cuda\.is_available\(\)", "False"),
    (r"torch\.cuda\.synchronize\(\)", "None"),
    # Channels: 72 are two full blocks and a part (float), or one and a part; and the wide rows that
    # they are cut from.
    (r"\[64, 4096 \+ 32\]", "[72]"),
    (r"\b4096 \+ dim \+ 64\b", "8 + dim + 8"),
    (r"\b4096:4096 \+ dim\b", "8:8 + dim"),
    (r"\[2048, 2048 \+ 16, 4096\]", "[72]"),
    (r"dim = 4096 \+ 32 ", "dim = 72 "),
    (r"dim = 1024\n    seqlen = 2048", "dim = 72\n    seqlen = 300"),
    (r"batch = 64\n", "batch = 4\n"),
    # Lengths: a block has 64 or 128 columns, or takes 512 (float) or 1024 (half) in one go.
    (r"\[1, 2, 8, 16, 32, 64, 128, 129, 130, .*, 4096\]", "[1, 2, 64, 129, 151, 1134]"),
    (r"\[8, 16, 32, 64, 128, 151, .*, 4096\]", "[8, 64, 151, 1134]"),
    (r"\[2048\]", "[300]"),
    (r"range\(10000\)", "range(3)"),
    (r"runs = (5|20)", "runs = 2"),
]
# The quick part: patched, one width, two or three blocks of channels, few lengths.
QUICK = re.compile(
    r"test_patched_.*(\[72-((2|151)-4-|1134-4-True-True|4-5-|itype)"
    r"|initial_states\[8|initial_states$|deterministic|race)"
)


def _module(source):
    """Return upstream's test module, in which the package is what `_package` sets later."""
    tree = forks.sources("causal-conv1d", source)
    path = tree / "tests" / "test_causal_conv1d.py"
    text = path.read_text()
    for pattern, replacement in CHANGES:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path}: found no {pattern!r}; mend CHANGES"
    imported = re.findall(r"^from causal_conv1d\.\w+ import (.*)$", text, re.MULTILINE)
    text = re.sub(r"^from causal_conv1d\.\w+ import .*$", "", text, flags=re.MULTILINE)
    module = types.ModuleType(f"upstream_{source}")
    module.wanted = [name.strip() for line in imported for name in line.split(",")]
    exec(compile(text, str(path), "exec"), vars(module))
    return module


try:
    # A request by itself (ci.forks check) stands in the place of the patched tree.
    SOURCES = ("patched",) if "FORKS_TREE" in os.environ else ("stock", "patched")
    MODULES = {source: _module(source) for source in SOURCES}
except forks.ForkError as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture(autouse=True)
def _package(request, emulated_conv):
    module = MODULES[request.function.source]
    package = emulated_conv(request.function.source)
    for name in module.wanted:
        if not hasattr(package, name):
            if name in request.function.__code__.co_names:
                pytest.skip(f"{name} needs triton")
            continue
        setattr(module, name, getattr(package, name))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


for _source, _upstream in MODULES.items():
    for _name, _test in list(vars(_upstream).items()):
        if _name.startswith("test_"):
            _test.source = _source
            globals()[f"test_{_source}_{_name.removeprefix('test_')}"] = _test

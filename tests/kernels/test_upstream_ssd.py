"""Upstream's and the patches' own tests of Mamba-2, on stock and on patched kernels.

mamba-ssm's kernels run in Triton's interpreter, causal-conv1d's on the emulation. The files are
read from the patched tree, and run as they are except for the device and for smaller sizes, as a
block of a kernel takes milliseconds here. On stock, tests of defects that the patches mend are
strict expected failures, and those of their additions are left out.
"""

import functools
import os
import re
import types
from unittest import mock

import pytest
import torch

from ci import forks
from ci.kernels import interpreter
from ci.kernels.emulation import selective_scan

pytestmark = pytest.mark.slow
if reason := interpreter.unavailable():
    pytest.skip(reason, allow_module_level=True)

UPSTREAM = forks.patched("mamba-ssm") / "tests"
DEVICE = (r'"cuda"', '"cpu"')
# By file, pairs of its text and the replacement. Each must be found, or the file is not what is
# expected.
CHANGES = {
    "ops/triton/test_ssd_states.py": [
        DEVICE,
        (r"nheads=4, headdim=8, ngroups=2", "nheads=2, headdim=8, ngroups=2"),
        # Norm and MLP, no norm and MLP, bf16. A piece takes as long as the whole.
        (r" +\(\w+, True, 0, False, torch\.float32\),\n", ""),
        (r"\[\[1, 2, 17, 18\], \[9\]\]", "[[1, 9]]"),
    ],
    "ops/triton/test_ssd_nonssm.py": [DEVICE],
    "ops/triton/test_ssd_dinitial_states.py": [DEVICE],
    "ops/triton/test_ssd_groups.py": [DEVICE],
    "test_mamba2_step.py": [DEVICE, (r'"rmsnorm", \[True, False\]', '"rmsnorm", [True]')],
    "test_mamba2_states.py": [
        DEVICE,
        (r'"splits", \[\[9, 10, 20\], \[21\]\]', '"splits", [[9, 10]]'),
    ],
    "test_determinism.py": [
        DEVICE,
        (r"not torch\.cuda\.is_available\(\)", "False"),
        (r"torch\.cuda\.synchronize\(\)", "None"),
        (r"batch = [24]", "batch = 1"),
        (r"seqlen = (2048|4096)", "seqlen = 64"),
        (r"d_model=headdim \* 4", "d_model=headdim"),
        (r"nheads = 8", "nheads = 2"),
        (r"headdim = 64", "headdim = 16"),
        (r"chunk_size: int = 256", "chunk_size: int = 32"),
        (r"chunk_size=64", "chunk_size=32"),
        (r"_HEADDIMS = \[64, 128\]", "_HEADDIMS = [16]"),
        (r"_DSTATES = \[64\]", "_DSTATES = [16]"),
        # Blocks run one after the other, so a second run shows as much as a fifth.
        (r"runs = (5|20)", "runs = 2"),
        (r"range\(3\)", "range(1)"),
    ],
}
ID_0 = "the initial state is taken to belong to sequence id 0"
# Tests of defects that patches mend: a pattern of the parameters that fail on stock, the error, and
# the reason.
DEFECTS = {
    "test_initial_states_seq_idx": (r"rows[123]", AssertionError, ID_0),
    "test_chunked_forward_seq_idx": ("", AssertionError, ID_0),
    "test_initial_states_varlen_states": (
        r"lengths[01]",
        AssertionError,
        "the state of a first sequence that ends in the first chunk lacks the initial state",
    ),
    "test_split_conv1d_scan_nonssm_no_rmsnorm": (
        "",
        RuntimeError,
        "the backward pass with an MLP beside the SSM expects a norm and an out_proj",
    ),
    "test_step": (
        r"dt_limit1|dt_limit0-True",
        AssertionError,
        "step ignores dt_limit, and repeats a D that has an entry for each channel",
    ),
    "test_dinitial_states_fp32": (
        "",
        AssertionError,
        "the gradient of float32 states is rounded to 16 bits",
    ),
    "test_split_conv1d_scan_ref_groups": (
        "",
        AssertionError,
        "the reference normalizes over all groups, the op each by itself",
    ),
}
# It looks for differences from run to run, and there are none where blocks run in order.
LEFT_OUT = "test_default_mode_is_not_reproducible"


def _module(source, file):
    """Return a test module, in which imports from mamba_ssm are what `_package` sets later."""
    path = UPSTREAM / file
    text = path.read_text()
    for pattern, replacement in CHANGES[file]:
        text, count = re.subn(pattern, replacement, text)
        # A request by itself has not all that the series brings to a file.
        alone = os.environ.get("FORKS_TREE")
        assert count or alone, f"{path}: found no {pattern!r}; mend CHANGES"
    module = types.ModuleType(f"upstream_{source}")
    pattern = r"^from (mamba_ssm\S*) import (.*)$"
    imports = re.findall(pattern, text, re.MULTILINE)
    module.wanted = [(part, name.strip()) for part, names in imports for name in names.split(",")]
    exec(compile(re.sub(pattern, "", text, flags=re.MULTILINE), str(path), "exec"), vars(module))
    return module


@pytest.fixture(scope="module")
def loaded(emulated_conv):
    """Map "stock" or "patched" to the ops of mamba-ssm, with the convolution emulated."""

    @functools.cache
    def load(source):
        conv, tree = emulated_conv(source), forks.sources("mamba-ssm", source)
        modules = ("modules.mamba2", "utils.generation")
        scan = selective_scan.when_used(tree)  # By the references.
        return interpreter.mamba_ssm(tree, conv=conv, modules=modules, selective_scan_cuda=scan)

    return load


@pytest.fixture(autouse=True)
def _package(request, loaded):
    module, source = request.function.module, request.function.source
    ops = loaded(source)
    for package, name in module.wanted:
        setattr(module, name, getattr(ops.imported[package], name, None))
    which, raises, reason = DEFECTS.get(request.node.originalname.replace("stock_", ""), [None] * 3)
    if which is not None and re.search(which, request.node.name.partition("[")[2]):
        request.applymarker(pytest.mark.xfail(strict=True, raises=raises, reason=reason))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # Some tests import from mamba_ssm when they are called, some change the environment.
    with ops.importing(), mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
    ops.check_guards()


# A request by itself (ci.forks check) stands in the place of the patched tree.
for _source in ("patched",) if "FORKS_TREE" in os.environ else ("stock", "patched"):
    for _file in CHANGES:
        # A request by itself brings one of these files.
        if not (UPSTREAM / _file).exists():
            continue
        _upstream = _module(_source, _file)
        for _name, _test in list(vars(_upstream).items()):
            is_wanted = _source == "patched" or "determinism" in _file or _name in DEFECTS
            if _name.startswith("test_") and _name != LEFT_OUT and is_wanted:
                _test.source, _test.module = _source, _upstream
                globals()[f"test_{_source}_{_name.removeprefix('test_')}"] = _test

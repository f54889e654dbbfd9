"""Emulated kernels for the tests of this folder: built once, skipped where they cannot be."""

import functools
import os
import subprocess
import sys

import pytest

from ci import forks
from ci.kernels import emulation


def pytest_collection_modifyitems(items):
    for item in items:
        quick = getattr(getattr(item, "module", None), "QUICK", None)
        if quick and not quick.search(item.name):
            item.add_marker(pytest.mark.slow)


@functools.cache
def _causal_conv1d(source):
    tree = forks.sources("causal-conv1d", source)
    return emulation.causal_conv1d(tree)


@pytest.fixture(scope="session")
def emulated_conv():
    """Map "stock" or "patched" to the package causal_conv1d on emulated kernels."""

    def load(source):
        try:
            return _causal_conv1d(source)
        except emulation.Unavailable as reason:
            pytest.skip(str(reason))

    return load


@pytest.fixture
def sanitized():
    """Run Python code, with arguments, in a process that may build with `sanitize=True`."""
    try:
        environment = os.environ | emulation.sanitizer_environment()
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))
    folders = [forks.ROOT, forks.ROOT / "tests"]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run

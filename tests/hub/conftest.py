"""These tests need `kernels` and the transformers that fits it: `nox -s test-hub-kernels`."""

from importlib.util import find_spec

if find_spec("kernels") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import pytest
    from hub_kernels import released_functions

    @pytest.fixture(autouse=True)
    def _no_kernel_afterwards():
        """A kernelized model changes all models of its class."""
        yield
        released_functions()

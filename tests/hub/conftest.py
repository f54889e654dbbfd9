"""Skip these tests unless `kernels` and its transformers are there: `nox -s test-hub-kernels`."""

from importlib.metadata import packages_distributions

if "kernels" not in packages_distributions():  # The folder tests/kernels can be imported too.
    collect_ignore_glob = ["test_*.py"]
else:
    import pytest
    from support.hub_kernels import released_functions

    @pytest.fixture(autouse=True)
    def _no_kernel_afterwards():
        """Undo kernelizing, which changes all models of a class."""
        yield
        released_functions()

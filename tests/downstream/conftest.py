"""Skip these tests unless the libraries are there, which only `nox -s downstream` installs."""

from importlib.util import find_spec

if find_spec("langchain_huggingface") is None:
    collect_ignore_glob = ["test_*.py"]

"""The libraries under test: as they are released, with compat's hooks, or the forks without them.

VERTICAL_CHUNKING_STACK is `released`, which is the default, or `forks`; `nox -s test-forks`
installs those and sets it.
"""

import os

import pytest

STACK = os.environ.get("VERTICAL_CHUNKING_STACK", "released")
if STACK not in ("released", "forks"):
    raise ValueError(f"VERTICAL_CHUNKING_STACK is {STACK!r}; it must be released or forks.")
FORKS = STACK == "forks"
# The fork of sentence-transformers has the core: a stream of chunks from Transformer to Pooling.
released_only = pytest.mark.skipif(FORKS, reason="compat alone has it; parked, or not in the forks")
# A fork runs a model on so many tokens when it is first read in chunks, to see that it is exact.
ASKED = 20 if FORKS else 0

"""The libraries under test: as they are released, with compat's hooks, or the forks without them.

VERTICAL_CHUNKING_STACK is `released`, which is the default, or `forks`; `nox -s test-forks`
installs those and sets it.
"""

import os

STACK = os.environ.get("VERTICAL_CHUNKING_STACK", "released")
if STACK not in ("released", "forks"):
    raise ValueError(f"VERTICAL_CHUNKING_STACK is {STACK!r}; it must be released or forks.")
FORKS = STACK == "forks"

"""Forks of upstream libraries: a pinned release, and the patches of this repository on it.

    python -m ci.forks sync   [LIBRARY…]   patches/LIBRARY -> forks/LIBRARY/tree
    python -m ci.forks export [LIBRARY…]   forks/LIBRARY/tree -> patches/LIBRARY
    python -m ci.forks check  [LIBRARY…] [--quick] [--only NAME]
                                           what must hold of the patches and requests as committed
    python -m ci.forks status [LIBRARY…]   the roadmap: native, patched or missing
    python -m ci.forks rebase LIBRARY VERSION   is the series right on another release, or `newest`?
    python -m ci.forks pages [LIBRARY…]    renew the list of requests in PULL_REQUEST.md
    python -m ci.forks request LIBRARY NAME --onto CHECKOUT
                                           a request as a branch in a clone of upstream
    python -m ci.forks propagate [KERNEL…] [--check]   patched forks -> hub kernels

`forks/LIBRARY/frames`, if it is there, has a frame of each file of tests that upstream has and the
sdist leaves out: its class, into which patches put tests. `request` puts them into the file itself.

`forks/LIBRARY/fork.toml` pins the release, and names overlays: files of this repository that the
fork takes as its own. `forks/LIBRARY/stock` has the release's files, as they are.
`forks/LIBRARY/tree` is a git repository: the release as tag `base`, the overlays as tag `overlay`,
and on branch `main` one commit for each patch. Patches are written as commits there; sync and
export are exact inverses.

A *request* is a pull request that could be sent: one or two patches with a page of their own,
`forks/LIBRARY/pull_requests/NN-NAME.md`. `check` applies each to the release with what it needs and
nothing else, and runs its tests and its reproduction before and after; `--quick` leaves that out,
`--only` looks at one. What no request has is parked in `patches/LIBRARY/parked`, with the reason.

`rebase` applies what applies, in a temporary folder, and runs there the tests that the series
brings: hunks that fit may use names that are gone. Its last line is the verdict: right (all
applies, and the tests pass), does not fit (something does not apply), broken (all applies, and a
test fails) or not run (all applies, and the tests could not be run here, or there are none). The
exit status is 0 for right alone.

Where patches do not fit, as after a change of the pin: move patches/LIBRARY away, sync, apply them
in the tree by `git am --keep`, mend there what does not fit, and export.
"""

from ci.forks._alone import request
from ci.forks._commands import (
    check,
    export,
    patched,
    request_tests,
    sources,
    status,
    sync,
    write_index,
)
from ci.forks._held import RequestTests
from ci.forks._rebase import Rebased, rebase
from ci.forks._release import PACKED, ROOT, Fork, ForkError, libraries, stock
from ci.forks._tests import FAILED, PASSED, Case, run_named, run_pytest, summary
from ci.forks.hub_kernels import kernels, propagate

__all__ = [
    "FAILED",
    "PACKED",
    "PASSED",
    "ROOT",
    "Case",
    "Fork",
    "ForkError",
    "Rebased",
    "RequestTests",
    "check",
    "export",
    "kernels",
    "libraries",
    "patched",
    "propagate",
    "rebase",
    "request",
    "request_tests",
    "run_named",
    "run_pytest",
    "sources",
    "status",
    "stock",
    "summary",
    "sync",
    "write_index",
]

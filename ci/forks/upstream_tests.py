"""Upstream's own tests: `python -m ci.forks.upstream_tests LIBRARY [--checkout FOLDER]`.

Runs the tests that a library's sdist holds on the release, on the fork, and on the release with
compat's hooks, each in a process of its own; and the tests that the series adds on the fork. Prints
what differs. Exit status 1 where a test that passed on the release does not pass on one of the
others, or a test of the series does not pass.

What is counted are names in pytest's report, where a subtest has the name of its test: the two are
one, with the worse outcome. pytest's own last line counts the outcomes of both.

The files are those that `upstream_tests` of fork.toml names. Many sdists lack most of them; a
checkout of the library's repository, at the tag of the release or near it, has them all.

This module is also the plugin of pytest that puts the hooks on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ci import forks
from ci.forks._release import Fork
from ci.forks._tests import FAILED, PASSED, Case, outcomes, own_tests, summary
from ci.forks.behaviour import PACKAGES

RELEASE, FORK, HOOKED = "release", "fork", "release with compat"


def pytest_configure() -> None:
    """Put compat's hooks on, where pytest has this module as its plugin."""
    import compat

    compat.enable_vertical_chunking()


def compared(library: str, checkout: Path | None, files: list[str], options: list[str]) -> int:
    """Run and print all of it, and return the exit status."""
    stock, tree = forks.stock(library), forks.patched(library)
    wanted = files or Fork.read(library).upstream_tests
    # A checkout near the release may not fit it; what the sdist has of its own goes first.
    tests = [stock, checkout] if checkout else [stock]
    there = [name for name in wanted if any((root / name).exists() for root in tests)]
    print(f"{library}: {len(there)} of {len(wanted)} of upstream's files of tests are there")
    for name in sorted(set(wanted) - set(there)):
        print(f"    not in the sdist{' nor the checkout' if checkout else ''}: {name}")
    runs = {RELEASE: (stock, []), FORK: (tree, []), HOOKED: (stock, ["-p", __spec__.name])}
    found: dict[str, dict[str, Case]] = {}
    for which, (sources, plugin) in runs.items():
        found[which] = outcomes(library, there, tests, sources, [*options, *plugin])
        print(f"{which}: {summary(found[which])}", flush=True)
    wrong = 0
    for which in (FORK, HOOKED):
        for name, case in sorted(found[RELEASE].items()):
            before = case.outcome
            now = found[which][name].outcome if name in found[which] else "missing"
            if now != before:
                print(f"    {which}: {name}: {before}, now {now}")
                wrong += before == PASSED
    if not files:
        own = outcomes(library, own_tests(tree), [tree], tree, options)
        print(f"the series' own tests, on the fork: {summary(own)}")
        for name, case in sorted(own.items()):
            if case.outcome == FAILED:
                print(f"    {name}: {case.outcome}")
                wrong += 1
    print(f"{library}: {wrong} regressions" if wrong else f"{library}: no regression")
    return int(bool(wrong))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.forks.upstream_tests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("library", choices=sorted(PACKAGES))
    parser.add_argument("files", nargs="*", help="instead of those of fork.toml")
    parser.add_argument("--checkout", type=Path, help="take upstream's tests from this folder")
    parser.add_argument("--pytest", default="", metavar="OPTIONS", help="more options for pytest")
    options = parser.parse_args(arguments)
    checkout = options.checkout and options.checkout.resolve()
    return compared(options.library, checkout, options.files, shlex.split(options.pytest))


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m ci.forks VERB [LIBRARY…]`, or `rebase LIBRARY VERSION`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ci import forks

VERBS = ["sync", "export", "check", "status", "rebase", "pages", "request", "propagate"]


def main(arguments: list[str] | None = None, root: Path = forks.ROOT) -> int:
    """Run the command line, and return the exit status: 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.forks",
        description=forks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help="all, if none is named")
    parser.add_argument("--check", action="store_true", help="propagate: write nothing")
    parser.add_argument("--force", action="store_true", help="sync: lose what is not exported")
    parser.add_argument("--quick", action="store_true", help="check: run nothing")
    parser.add_argument("--only", default="", metavar="NAME", help="check: this request")
    parser.add_argument("--onto", type=Path, metavar="CHECKOUT", help="request: the clone")
    options = parser.parse_intermixed_args(arguments)
    libraries = options.libraries or forks.libraries(root)
    if options.verb == "rebase" and len(options.libraries) != 2:
        parser.error("rebase takes a library and a version of it, or `newest`")
    if options.verb == "request" and (len(options.libraries) != 2 or not options.onto):
        parser.error("request takes a library, a request of it, and --onto CHECKOUT")
    problems = []
    try:
        if options.verb == "request":
            library, name = options.libraries
            tree = forks.patched(library, root)
            made, lines = forks.request(library, name, options.onto, tree, root)
            print("\n".join(lines))
            return int(not made)
        if options.verb == "status":
            print(forks.status(libraries, root))
            return 0
        if options.verb == "rebase":
            library, version = libraries
            rebased = forks.rebase(library, version, root)
            print(rebased.text)
            return int(rebased.verdict != "right")
        if options.verb == "propagate":
            for kernel in options.libraries or forks.kernels(root):
                changed = forks.propagate(kernel, root, check=options.check)
                print(f"{kernel}: {'built' if changed else 'nothing to do'}", flush=True)
            return 0
        for library in libraries:
            if options.verb == "sync":
                changed = forks.sync(library, root, force=options.force)
                done = "built" if changed else "nothing to do"
            elif options.verb == "export":
                done = "exported" if forks.export(library, root) else "nothing to do"
            elif options.verb == "pages":
                done = "written" if forks.write_index(library, root) else "nothing to do"
            else:
                found = forks.check(library, root, quick=options.quick, only=options.only)
                problems += found
                done = f"problems: {len(found)}" if found else "right"
            print(f"{library}: {done}", flush=True)
    except forks.ForkError as error:
        problems.append(str(error))
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

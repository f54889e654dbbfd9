"""Streamed token ids against those of the whole text: `python -m ci.fuzz --cases 2000`.

Exit status 1 if any differ; each is named by kind and seed, which `--seeds` runs again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from ci.fuzz.cases import Difference, case
from ci.fuzz.kinds import KINDS


def main() -> int:
    """Run the cases and print a line a kind."""
    parser = argparse.ArgumentParser(prog="python -m ci.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    failed = 0
    for kind in options.kinds:
        found: Counter[str] = Counter()
        for seed in range(options.first, options.first + options.cases):
            result = case(kind, seed)
            if isinstance(result, Difference):
                print(f"  {kind}, seed {seed}: {result.what}")
                failed += 1
                found["different"] += 1
            else:
                found[result] += 1
        print(f"{kind:14}" + ", ".join(f"{n} {what}" for what, n in sorted(found.items())))
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m ci.futures`: see `trial.py`, whose functions other processes find there."""

import sys

from ci.futures.trial import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

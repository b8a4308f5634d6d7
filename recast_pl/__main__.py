"""Runs the command line: `python -m recast_pl`."""

import sys

from recast_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())

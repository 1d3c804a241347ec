"""`python -m vidi`, the same as `vidi`."""

import sys

from vidi.cli import main

if __name__ == "__main__":
    sys.exit(main())

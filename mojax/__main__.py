"""`python -m mojax` is `mojax`."""

import sys

from mojax.cli import main

if __name__ == "__main__":
    sys.exit(main())

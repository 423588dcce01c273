"""`python -m rampart` is the command line."""

import sys

from rampart.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The command line, as `rampart` and as `python -m rampart`."""

import sys
from typing import Any


def main() -> Any:
    """Run it. Processes that a server starts import this file too, and need none of the rest."""
    from rampart import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

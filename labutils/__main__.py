"""`python -m labutils`: the command line of the lab, see `labutils.cli`."""

import sys

from labutils.cli import main

if __name__ == "__main__":
    sys.exit(main())

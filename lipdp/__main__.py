"""The commands of the package: ``python -m lipdp``."""

import sys

from lipdp.cli import main

if __name__ == "__main__":
    sys.exit(main())

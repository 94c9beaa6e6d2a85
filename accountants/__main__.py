"""The commands of the package: ``python -m accountants``."""

import sys

from accountants.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))

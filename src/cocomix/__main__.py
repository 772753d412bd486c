"""`python -m cocomix`, and with it `torchrun -m cocomix`."""

import sys

from cocomix.cli import main

if __name__ == "__main__":
    sys.exit(main())

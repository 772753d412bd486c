"""Entry point of `python -m cocomix` and `torchrun -m cocomix`."""

import sys

from cocomix.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m moestro`: the same as the `moestro` command."""

import sys

from moestro.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m nemo_disco: the command line."""

import sys

from nemo_disco.cli import main

if __name__ == "__main__":
    sys.exit(main())

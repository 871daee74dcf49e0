"""The command line as `python -m nemo_disco`."""

import sys

from nemo_disco.cli import main

if __name__ == "__main__":
    sys.exit(main())

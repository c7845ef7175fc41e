"""`python -m mindrlhf`."""

import sys

from mindrlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

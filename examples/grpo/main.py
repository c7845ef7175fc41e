"""What msrun starts, as it takes a file: `main.py --config x.yaml a.b=c` is `mindrlhf grpo --config x.yaml a.b=c`."""

import sys

from mindrlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["grpo", *sys.argv[1:]]))

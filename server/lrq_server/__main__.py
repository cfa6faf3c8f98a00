"""``python -m lrq_server``: the lrq-server command without its script."""

import sys

from lrq_server.cli import main

if __name__ == "__main__":
    sys.exit(main())

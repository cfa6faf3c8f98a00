"""``python -m lrq_server``: the lrq-server command without its script."""

import sys

from lrq_server.cli import main

sys.exit(main())

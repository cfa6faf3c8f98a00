"""Self-contained HTML pages with pictures: what lrq-offline's and lrq-server's pages have in common. Needs matplotlib."""

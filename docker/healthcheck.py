"""Docker's HEALTHCHECK: exit code 0 if the server in this container takes requests (GET /lrq/ready), else 1 and why.

Inside a container the server listens to port 8000; another one outside is a matter of `docker run --publish`.
"""

import os
import sys
import urllib.error
import urllib.request

url = os.environ.get("LRQ_HEALTH_URL", "http://127.0.0.1:8000/lrq/ready")
try:
    with urllib.request.urlopen(url, timeout=5) as answer:
        print(answer.status)
except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
    sys.exit(f"{url}: {error}")

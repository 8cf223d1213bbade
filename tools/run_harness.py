"""Tasks of lm-evaluation-harness with quantised caches: the same as `million harness`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["harness", *sys.argv[1:]])

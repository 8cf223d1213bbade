"""Score a quantised cache against the dense one: the same as `million evaluate`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]])

"""Run the demo: the same as `million demo`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])

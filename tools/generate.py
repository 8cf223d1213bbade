"""Generate text with a quantised cache: the same as `million generate`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["generate", *sys.argv[1:]])

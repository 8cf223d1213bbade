"""Train codebooks for a model: the same as `million calibrate`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["calibrate", *sys.argv[1:]])

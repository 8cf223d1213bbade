"""Show energy and distortion of codebooks: the same as `million inspect`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["inspect", *sys.argv[1:]])

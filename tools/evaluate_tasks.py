"""Needles in a haystack and other long-context tasks: the same as `million tasks`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["tasks", *sys.argv[1:]])

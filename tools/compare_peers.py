"""Score other systems' quantised caches beside ours: the same as `million compare`."""

import sys

from million_cache.cli import app

if __name__ == "__main__":
    app(["compare", *sys.argv[1:]])

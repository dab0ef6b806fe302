"""``python -m gpusvc.release NAME``: the release proof of one model."""

from __future__ import annotations

import sys

from gpusvc.release.procedure import main

if __name__ == "__main__":
    sys.exit(main())

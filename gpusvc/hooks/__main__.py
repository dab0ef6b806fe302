"""ExecStart= of gpusvc-hooks.service."""

from __future__ import annotations

import sys

from gpusvc.hooks.daemon import main

if __name__ == "__main__":
    sys.exit(main())

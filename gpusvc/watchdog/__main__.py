"""ExecStart= of gpusvc-watchdog.service."""

from __future__ import annotations

import sys

from gpusvc.watchdog.daemon import main

if __name__ == "__main__":
    sys.exit(main())

"""ExecStart= of model@NAME.service."""

from __future__ import annotations

from gpusvc.launcher.launch import main

if __name__ == "__main__":
    main()

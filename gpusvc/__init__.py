"""gpusvc: systemd-integrated services for machines with GPUs.

Each model server is a unit, ``model@NAME.service``; this package decides where it runs, and proves that it is gone.
"""

__version__ = "0.2.0"

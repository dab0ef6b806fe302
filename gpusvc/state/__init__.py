"""The files under /run/gpusvc and /var/lib/gpusvc."""

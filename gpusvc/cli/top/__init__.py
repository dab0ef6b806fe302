"""``gpusvc top``: the live view."""

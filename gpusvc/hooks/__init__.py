"""gpusvc-hooks.service: the administrator's programs, run on events."""

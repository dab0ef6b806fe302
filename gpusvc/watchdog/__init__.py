"""gpusvc-watchdog.service: idle, stuck and leaking models."""

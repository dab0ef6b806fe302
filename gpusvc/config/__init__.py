"""The configuration files: how they are read, checked, explained and written."""

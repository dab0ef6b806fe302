"""Finds what is wrong with a machine, and how to repair it. Each module checks one part."""

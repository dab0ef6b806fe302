"""The management API on /run/gpusvc/api.sock: HTTP (aiohttp) for people, programs and the gateway.

It starts models for the gateway. A polkit rule lets its user start and stop models, and nothing else.
"""

"""The management API on /run/gpusvc/api.sock: what people, programs and the gateway ask of gpusvc over HTTP (aiohttp).

It alone starts models for the gateway. Its user may start and stop models by a rule of polkit's, and nothing else.
"""

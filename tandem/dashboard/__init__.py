"""A small web page of jobs, their curves and rollouts, and of the engine: a client of both services, on loopback.

`docs/dashboard.md` is its guide. Nothing else of Tandem imports it: it needs aiohttp.
"""

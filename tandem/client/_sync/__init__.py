"""The client for threads, made by `tests.contract.unasync` from the one for asyncio: change that one."""

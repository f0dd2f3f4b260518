"""Training jobs: what they are made of, their states, where they are kept, and the processes that run them.

Nothing here knows of gRPC, and what the service imports of it loads neither torch nor TRL: a job runs in processes of
its own (`run`, `child`).
"""

from tandem.processes import Child, ChildError, Interrupted, Processes

__all__ = ["Child", "ChildError", "Interrupted", "Processes"]

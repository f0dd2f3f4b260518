"""What ranks of one run say to each other."""

from __future__ import annotations


class OtherRankError(RuntimeError):
    """Another rank failed. The message says with what."""

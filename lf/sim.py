"""Ranks without machines: `spmd` runs every rank of a mesh in this process, with real data."""

from lf.axes_sim import CollectiveMismatch, Deadlock, spmd

__all__ = ["CollectiveMismatch", "Deadlock", "spmd"]

"""Trained nets for use: norms folded, integer arithmetic, packed weights."""

from efficient_nets.deploy.folding import fold_norms
from efficient_nets.deploy.integer import to_integers
from efficient_nets.deploy.packed import load, save

__all__ = ["fold_norms", "load", "save", "to_integers"]

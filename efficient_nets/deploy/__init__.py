"""Trained nets for use: norms folded, biases corrected, integer arithmetic, packed weights."""

from efficient_nets.deploy.correction import correct_biases
from efficient_nets.deploy.folding import fold_norms
from efficient_nets.deploy.integer import to_integers
from efficient_nets.deploy.packed import load, save

__all__ = ["correct_biases", "fold_norms", "load", "save", "to_integers"]

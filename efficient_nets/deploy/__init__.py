"""Trained nets for use: integer arithmetic, packed weights."""

from efficient_nets.deploy.integer import to_integers
from efficient_nets.deploy.packed import load, save

__all__ = ["load", "save", "to_integers"]

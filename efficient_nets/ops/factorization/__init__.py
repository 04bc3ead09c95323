"""Factorized kernels: CP, Tucker, TT, TR, HT and block terms, of dense and convolution kernels.

form = factorization.parse("tt:8")
network = form.network((3, 3, 64, 128))
cores = factorization.decompose(form.form, network, kernel)
kernel = factorization.reconstruct(network, cores)
"""

from efficient_nets.ops.factorization.decomposition import approximate, decompose, relative_error
from efficient_nets.ops.factorization.execution import cheapest, factorized_map, makes_kernel, plan
from efficient_nets.ops.factorization.factored import Factored, dense
from efficient_nets.ops.factorization.joint import layer_network, layer_of, scale_layers
from efficient_nets.ops.factorization.lookup import lookup, lookup_cost
from efficient_nets.ops.factorization.network import Cores, Network, core_scale, reconstruct
from efficient_nets.ops.factorization.pruning import contributions, pruned_together
from efficient_nets.ops.factorization.regularization import dropped, rank_lasso
from efficient_nets.ops.factorization.selection import of_kernel, of_network, with_ranks
from efficient_nets.ops.factorization.spec import DENSE, Factorization, parse

__all__ = [
    "DENSE",
    "Cores",
    "Factored",
    "Factorization",
    "Network",
    "approximate",
    "cheapest",
    "contributions",
    "core_scale",
    "decompose",
    "dense",
    "dropped",
    "factorized_map",
    "layer_network",
    "layer_of",
    "lookup",
    "lookup_cost",
    "makes_kernel",
    "of_kernel",
    "of_network",
    "parse",
    "plan",
    "pruned_together",
    "rank_lasso",
    "reconstruct",
    "relative_error",
    "scale_layers",
    "with_ranks",
]

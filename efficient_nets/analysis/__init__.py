"""Looking at nets and runs: what layers cost, the layer table, curves of a run."""

from efficient_nets.analysis.cost import LayerCost, layer_costs, model_cost
from efficient_nets.analysis.curves import plot_curves, read_metrics
from efficient_nets.analysis.summary import layer_table, summary_dict

__all__ = [
    "LayerCost",
    "layer_costs",
    "layer_table",
    "model_cost",
    "plot_curves",
    "read_metrics",
    "summary_dict",
]

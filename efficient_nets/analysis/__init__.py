"""Looking at nets and runs: costs, the layer table, curves, and what is inside of layers."""

from efficient_nets.analysis import maps, plots
from efficient_nets.analysis.analyze import (
    Analysis,
    LayerAnalysis,
    analyze,
    batch_histograms,
    cross_entropy,
)
from efficient_nets.analysis.cost import LayerCost, layer_costs, model_cost
from efficient_nets.analysis.curves import plot_curves, read_metrics
from efficient_nets.analysis.histogram import Histogram, histogram
from efficient_nets.analysis.history import histograms_of, plot_history, save_histograms
from efficient_nets.analysis.plots import plot_analysis
from efficient_nets.analysis.reference import Reference, read_reference
from efficient_nets.analysis.report import add_histogram, analysis_table, write_analysis
from efficient_nets.analysis.spectrum import Spectrum, layer_spectrum
from efficient_nets.analysis.summary import layer_table, summary_dict

__all__ = [
    "Analysis",
    "Histogram",
    "LayerAnalysis",
    "LayerCost",
    "Reference",
    "Spectrum",
    "add_histogram",
    "analysis_table",
    "analyze",
    "batch_histograms",
    "cross_entropy",
    "histogram",
    "histograms_of",
    "layer_costs",
    "layer_spectrum",
    "layer_table",
    "maps",
    "model_cost",
    "plot_analysis",
    "plot_curves",
    "plot_history",
    "plots",
    "read_metrics",
    "read_reference",
    "save_histograms",
    "summary_dict",
    "write_analysis",
]

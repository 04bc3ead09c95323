"""What `--mode=prune` leaves to read: a table, a picture, JSON and a config."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import reporting
from efficient_nets.search import config_file, decompose_report

HEADER = ("layer", "bonds", "parameters", "were", "share")


def write(report: dict[str, Any], workdir: pathlib.Path) -> None:
    """prune.json, prune.txt and plots/prune.png; prints the table."""
    reporting.write_report(workdir, "prune", report, table(report), plot)
    print(f"pruned net   {workdir / 'pruned'}")
    print(f"its config   {workdir / 'built_config.py'}", flush=True)


def write_config(config: ConfigDict, report: dict[str, Any], workdir: pathlib.Path) -> None:
    """built_config.py, which trains the pruned net on, and evaluates it."""
    path, main = workdir / "built_config.py", "    python -m efficient_nets.main"
    share = report["after_cost"]["params"] / report["before_cost"]["params"]
    lines = (
        f"A net whose bonds were pruned, with {share:.2%} of its parameters.",
        "",
        f"{main} --config={path} --workdir={workdir / 'built'}",
        f"{main} --config={path} --workdir={workdir / 'check'} --mode=eval "
        f"--checkpoint={workdir / 'pruned'}",
        "",
        f"Ranks by --mode=prune --threshold={report['threshold']:g}; trained from what was left.",
        "",
    )
    config_file.write(path, config, lines)


def table(report: dict[str, Any]) -> str:
    """A line a layer: its bonds before and after, and numbers of its cores; then the whole net."""
    rows = []
    for name, found in report["layers"].items():
        pairs = zip(found["before"].values(), found["after"].values(), strict=True)
        bonds = " ".join(f"{a}>{b}" if a != b else str(a) for a, b in pairs)
        before, after = found["params_before"], found["params_after"]
        rows.append((name, bonds, f"{after:,}", f"{before:,}", f"{after / before:.1%}"))
    verdict = decompose_report.verdict(
        report["before_cost"], report["after_cost"], report["before"], report["after"]
    )
    return decompose_report.ruled(HEADER, rows, verdict)


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """The contributions of all bonds, sorted; what lies below the line went."""
    from matplotlib.figure import Figure  # the import costs more than half a second

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes, least = figure.add_subplot(), max(report["threshold"], 1e-6) / 10
    for name, found in report["layers"].items():
        for bond, shares in found["contributions"].items():
            shares = [max(share, least) for share in shares]
            axes.plot(range(1, len(shares) + 1), shares, marker=".", label=f"{name} {bond}")
    if report["threshold"]:
        axes.axhline(report["threshold"], color="black", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("indices of a bond, by contribution")
    axes.set_ylabel("contribution, as a share of the largest")
    axes.set_title("What the indices of bonds add to the kernels", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path)

"""`--mode=rank`: whether shared weights rank architectures as training each on its own does.

    python -m efficient_nets.main --config=configs/enas_mnist.py --mode=rank --checkpoint=DIR \\
        --workdir=DIR/rank

takes the shared net of the search in DIR, and `config.search.ranked` random architectures. Each is
measured on the whole validation split with the shared weights, batch norms made anew for it; then
trained from scratch, by the search's own settings, for `config.search.ranked_epochs`.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import data, reporting, train, workdirs
from efficient_nets.analysis import figures
from efficient_nets.errors import UserError
from efficient_nets.evaluation import put_resident
from efficient_nets.search import cell_search, cell_steps, evolution, judging
from efficient_nets.search.rewards import kendall, spearman


def rank(config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Measures both, and writes the report; the same command goes on where a killed one was.

    Args:
      config: The search's.
      workdir: Gets rank.json, rank.txt, plots/rank.png, and a run in ranked/NUMBER of each.
      folder: The search's workdir.

    Returns:
      What rank.json holds.

    Raises:
      UserError: on a config that is no search's, or a folder without its checkpoint.
    """
    configs.check(config)
    cell_steps.check(config)
    search = cell_steps.prepare(config, data.load(config.data))
    run, trained = search.judged, search.run.abstract
    net, left = workdirs.restore_net(folder, {"params": trained.params, "stats": trained.stats})
    if left:
        few = "; ".join(f"{path} {reason}" for path, reason in list(left.items())[:5])
        raise UserError(f"--checkpoint={folder} holds another net ({len(left)} leaves): {few}")
    state = search.of_one(trained._replace(**net, ema={}))
    key = search.key(cell_steps.OF_RANKED)
    architectures = np.asarray(evolution.randoms(search.space, key, config.search.ranked))
    judge = judging.Judge(run, config.search.norm_batches, put_resident(run, "train"))
    total = 2 * len(architectures)
    found = []
    with reporting.progress(total, desc="ranking", unit="net") as bar:
        for tokens in architectures:
            scores = judge(state, tokens)
            arc = search.space.text(tokens)
            found.append({"arc": arc, "shared": scores["validation/accuracy"]})
            bar.update()
        for number, one in enumerate(found):
            of_one = cell_search.built(config, one["arc"], as_searched=True)
            cell_search.lengthen(of_one, config.search.ranked_epochs)
            of_one.schedule.period = config.search.ranked_epochs  # ends where a cycle does
            one["alone"] = _trained(of_one, workdir / "ranked" / str(number))
            bar.update()
    shared, alone = ([one[name] for one in found] for name in ("shared", "alone"))
    report = {
        "architectures": found,
        "epochs": config.search.ranked_epochs,
        "kendall": kendall(shared, alone),
        "spearman": spearman(shared, alone),
        "dataset": run.dataset.info.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    if jax.process_index() == 0:
        reporting.write_report(workdir, "rank", report, table(report), plot)
    return report


def _trained(config: ConfigDict, workdir: pathlib.Path) -> float:
    """The validation accuracy of a run, which is made if it is not there."""
    path = workdir / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    if result.get("config_hash") != configs.fingerprint(config):
        result = train.train(config, workdir)
    return result["validation/accuracy"]


def table(report: dict[str, Any]) -> str:
    """A line an architecture, the best of those trained alone first."""
    lines = [f"{'shared':>8}  {'alone':>8}  architecture"]
    for one in sorted(report["architectures"], key=lambda one: -one["alone"]):
        lines.append(f"{one['shared']:>8.2%}  {one['alone']:>8.2%}  {one['arc']}")
    lines.append(
        f"validation accuracy with the shared weights, and trained alone for {report['epochs']:g} "
        f"epochs: Kendall's tau {report['kendall']:.3f}, Spearman's rho {report['spearman']:.3f}"
    )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Both accuracies of each architecture against each other."""
    figure = figures.new_figure(4.6, 4.0)
    axes = figure.subplots()
    pairs = [(one["shared"], one["alone"]) for one in report["architectures"]]
    axes.scatter(*zip(*pairs, strict=True))
    axes.set_xlabel("validation accuracy with the shared weights")
    axes.set_ylabel(f"trained alone, {report['epochs']:g} epochs")
    axes.set_title(f"Kendall's tau {report['kendall']:.2f}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path)

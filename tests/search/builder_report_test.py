"""The table and the plot of runs of any length, from a report alone."""

import pytest

from efficient_nets.search import builder_report


def report(rounds, stopped="budget", kind="macs", floor=0.0):
    """A run in which `rounds` of ten layers go, l0 first, each a tenth of the cost."""
    records = []
    for number in range(rounds + 1):
        cost = 1000 - 100 * number
        records.append(
            dict(round=number, removed=[f"l{number - 1}"] if number else [], params=cost, macs=cost)
            | {"validation/accuracy": 0.9 - 0.01 * number, "test/accuracy": 0.88}
            | dict(seconds=0.02, train_seconds=12.3)
        )
        if number < rounds:
            scores = [dict(layer=f"l{i}", ri=10.0 ** (number - i)) for i in range(number, 10)]
            records[-1]["scores"] = scores
    answer = rounds - (stopped == "floor")
    return dict(
        builder=dict(accuracy_floor=floor),
        budget=dict(kind=kind, keep=0.7, first=records[0][kind], limit=0.0, least=0.0),
        stopped=stopped,
        answer=answer,
        removed=[f"l{i}" for i in range(answer)],
        rounds=records,
    )


def test_the_table_has_a_line_a_round_and_says_why_it_ended():
    lines = builder_report.table(report(2)).splitlines()
    assert lines[0].split() == [
        *("round", "removed", "RI", "params", "MACs", "kept"),
        *("validation", "test", "forward", "trained"),
    ]
    assert lines[2].split() == [
        *("0", "-", "-", "1,000", "1,000", "100.00%", "90.00%", "88.00%", "20.0", "ms", "12", "s")
    ]
    assert lines[4].split()[:6] == ["2*", "l1", "1", "800", "800", "80.00%"]
    assert lines[-1] == (
        "Built: the net of round 2, without 2 layers, with 80.00% of the MACs (budget 70.00%). "
        "Stopped as the budget is met."
    )


def test_below_the_floor_the_mark_is_on_the_round_before():
    text = builder_report.table(report(3, stopped="floor"))
    assert "\n   2*  l1" in text and "of round 2, without 2 layers" in text
    assert "fell below the accuracy floor" in text


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_a_plot_has_a_panel_for_every_scored_round(rounds, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, path: figures.append(f) or save(f, path))
    builder_report.plot(report(rounds, floor=0.8), tmp_path / "plot.png")
    accuracy, *panels = figures[0].axes
    panels = [axes for axes in panels if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [f"RI after round {i}" for i in range(rounds)]
    x, y = accuracy.lines[0].get_data()
    assert list(x) == [(10 - i) / 10 for i in range(rounds + 1)] and y[0] == 0.9
    for number, axes in enumerate(panels):
        red = [bar.get_y() for bar in axes.patches if bar.get_facecolor()[0] > 0.5]
        assert len(axes.patches) == 10 - number and red == [number - 0.4]
    assert (tmp_path / "plot.png").stat().st_size > 5000

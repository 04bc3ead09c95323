"""The notebooks: their cells run in order, in a folder of their own, as a person runs them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "launch").glob("*.ipynb"))

# What Jupyter is to the cells: one namespace, and something that displays. It takes the cells, what
# a person would change in the first one, and what must hold at the end.
JUPYTER = """
import json, sys, types

displayed = []
display = types.ModuleType("IPython.display")
display.Image = lambda filename, width: open(filename, "rb").read(8)
display.display = displayed.append
stand_ins = {"IPython": types.ModuleType("IPython"), "IPython.display": display}
namespace = {"__name__": "__main__"}
cells, settings, check = json.load(sys.stdin)
for number, cell in enumerate(cells):
    if "import Image, display" in cell:  # and in no other: libraries ask IPython for more
        assert cell.count("import ") == 1
        sys.modules.update(stand_ins)
    exec(compile(cell, f"<code cell {number}>", "exec"), namespace)
    for name in stand_ins:
        sys.modules.pop(name, None)
    if number == 0:
        assert settings.keys() <= namespace.keys()
        namespace.update(settings)
assert len(displayed) >= 2 and set(displayed) == {b"\\x89PNG\\r\\n\\x1a\\n"}, displayed
exec(check, namespace | {"displayed": displayed})
"""

# Settings, what must hold at the end, what is printed, and a file that is left.
RUNS = {
    "colab.ipynb": (
        {"EPOCHS": 0.5},
        "for name in 'test/accuracy', 'test/loss':  # the best checkpoint is the only one\n"
        "    assert abs(scores[name] - result[name]) < 1e-6",
        "ours+branch",
        "runs/quickstart-0.5/result.json",
    ),
    "analysis.ipynb": (
        {"EPOCHS": 0.5, "WORKDIR": "runs/looked_into"},
        "assert len(displayed) == 10  # seven of the net, and three over training\n"
        "assert [layer.neuron for layer in own.layers] == ['t1:2', 'linear']",
        "stage1/0/conv1: n = 144",
        "runs/looked_into/analysis.json",
    ),
}


def notebook(name):
    return json.loads((ROOT / "launch" / name).read_text())


def code(name):
    return ["".join(c["source"]) for c in notebook(name)["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_holds_no_outputs(name):
    for cell in notebook(name)["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_cells_run_in_order(name, tmp_path):
    settings, check, printed, left = RUNS[name]
    xla = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla}
    result = subprocess.run(
        [sys.executable, "-c", JUPYTER],
        input=json.dumps([code(name), settings, check]),
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert printed in result.stdout
    assert (tmp_path / left).exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_where_the_package_is_missing_it_asks_for_the_repository(name, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # An editable installation puts a folder of the project on the path, beside site-packages.
    hidden = "'site-packages' in path or os.path.isdir(os.path.join(path, 'efficient_nets'))"
    hide = f"import os, sys; sys.path[:] = [path for path in sys.path if not ({hidden})]\n"
    command = [sys.executable, "-c", hide + "\n".join(code(name)[:2])]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "Set REPOSITORY in the first cell" in result.stderr

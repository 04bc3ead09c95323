"""The Colab notebook: its cells run in order, in a folder of their own, as a person runs them."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "launch" / "colab.ipynb").read_text())
CELLS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]

# What Jupyter is to the cells: one namespace, and something that displays. EPOCHS is what a person
# would change in the first cell.
JUPYTER = """
import json, sys, types

displayed = []
display = types.ModuleType("IPython.display")
display.Image = lambda filename, width: open(filename, "rb").read(8)
display.display = displayed.append
stand_ins = {"IPython": types.ModuleType("IPython"), "IPython.display": display}
namespace = {"__name__": "__main__"}
for number, cell in enumerate(json.load(sys.stdin)):
    if "import Image, display" in cell:  # and in no other: libraries ask IPython for more
        assert cell.count("import ") == 1
        sys.modules.update(stand_ins)
    exec(compile(cell, f"<code cell {number}>", "exec"), namespace)
    for name in stand_ins:
        sys.modules.pop(name, None)
    if number == 0:
        namespace["EPOCHS"] = 0.5
assert len(displayed) >= 2 and set(displayed) == {b"\\x89PNG\\r\\n\\x1a\\n"}, displayed
for name in "test/accuracy", "test/loss":  # the best checkpoint is the only one
    assert abs(namespace["scores"][name] - namespace["result"][name]) < 1e-6
"""


def test_it_holds_no_outputs():
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_its_cells_run_in_order(tmp_path):
    xla = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla}
    result = subprocess.run(
        [sys.executable, "-c", JUPYTER],
        input=json.dumps(CELLS),
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "ours+branch" in result.stdout
    assert (tmp_path / "runs" / "quickstart-0.5" / "result.json").exists()


def test_where_the_package_is_missing_it_asks_for_the_repository(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # An editable installation puts the project's own folder on the path, beside site-packages.
    hidden = f"'site-packages' in path or path == {str(ROOT)!r}"
    hide = f"import sys; sys.path[:] = [path for path in sys.path if not ({hidden})]\n"
    command = [sys.executable, "-c", hide + "\n".join(CELLS[:2])]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "Set REPOSITORY in the first cell" in result.stderr

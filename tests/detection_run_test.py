"""A detector from the command line: train, evaluate, predict, start from a classifier."""

import json
import runpy
import types

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from efficient_nets import config as configs
from efficient_nets import data, experiment, train, workdirs
from efficient_nets.checkpoint import restore_params
from efficient_nets.errors import UserError
from efficient_nets.prediction import _files
from tests.data.conftest import write_tfds  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
COLOURS = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)


def painted(seed):
    """A square of one of two colours on grey noise, and where it is."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 160, (48, 48, 3), dtype=np.uint8)
    top, left = rng.integers(0, 24, 2)
    image[top : top + 24, left : left + 24] = COLOURS[seed % 2]
    box = tfds.features.BBox(*(float(x) / 48 for x in (top, left, top + 24, left + 24)))
    return dict(image=image, objects=[{"bbox": box, "label": seed % 2}])


@pytest.fixture
def squares(write_tfds):  # noqa: F811
    label = tfds.features.ClassLabel(names=["red", "blue"])
    objects = tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "label": label})
    features = {"image": tfds.features.Image(shape=(48, 48, 3)), "objects": objects}
    examples = [painted(seed) for seed in range(56)]
    return write_tfds(features, {"train": examples[:48], "test": examples[48:]}, "squares")


CONFIG = """
from efficient_nets import config as configs

def get_config(task="detection"):
    config = configs.defaults()
    backbone = dict(layout="Q7", width=1 / 16)
    config.train.batch_size = config.evaluate.batch_size = 8
    config.data.image_size = 32
    if task == "classification":
        config.data.name, config.train.epochs = "digits", 0.1
        config.data.train = "train[:160]"
        config.model = configs.model("vgg", **backbone)
        return config
    config.task = "detection"
    config.model = configs.model("ssd", backbone="vgg", **backbone)
    config.layers = (
        dict(match="^backbone/stage[23]", neuron="ours", norm="branch"),
        dict(match="^backbone/stage5", algorithm="winograd:2"),
        dict(match="^dense", precision="lsq:w4a4"),
    )
    config.data.name, config.data.dir = "squares", {folder!r}
    config.data.mean, config.data.std = (0.5,) * 3, (0.25,) * 3
    config.data.max_boxes = 2
    config.detection.expand = 1.0
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 3e-3
    config.train.epochs = 10.0
    config.evaluate.every_epochs = config.checkpoint.every_epochs = 5.0
    return config
"""


def size_of(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.slow
def test_a_run(command, squares, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])  # there is less to compile
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace("{folder!r}", repr(squares)))
    run = tmp_path / "run"
    status, out, err = command(f"--config={config}", f"--workdir={run}")
    assert status == 0, err
    result = json.loads((run / "result.json").read_text())
    assert result["test/ap50"] > 0.3  # one that knows nothing has about 0; 60 steps give about 0.5
    assert result["test/ap50"] == pytest.approx(
        (result["test/ap50_red"] + result["test/ap50_blue"]) / 2
    )
    assert size_of(run / "plots" / "test_boxes.png") == (960, 960)

    given = tmp_path / "given"
    given.mkdir()
    Image.fromarray(painted(1)["image"]).resize((96, 64)).save(given / "blue.png")
    (given / "bad.png").write_bytes(b"no image")
    (given / "empty.jpg").touch()
    (given / "notes.txt").write_text("no picture")
    options = (f"--config={config}", f"--workdir={run}", "--mode=predict", "--step=best")
    status, out, err = command(*options, f"--input={given}")
    assert status == 0, err
    (name, found), *others = json.loads((run / "predictions.json").read_text()).items()
    assert name.endswith("blue.png") and not others
    assert (found["width"], found["height"]) == (96, 64)
    assert found["detections"][0]["class"] in ("red", "blue")
    assert size_of(run / "predictions" / "blue.png.png") == (96, 64)
    status, out, err = command(*options, f"--input={given / 'bad.png'}")
    assert status == 2 and "no image that can be read" in err

    # From a classifier's checkpoint: what its backbone has is the classifier's, the rest fresh.
    plain = tmp_path / "plain"
    assert command(f"--config={config}:classification", f"--workdir={plain}")[0] == 0
    warm = runpy.run_path(str(config))["get_config"]()
    warm.checkpoint.init_from, warm.layers = str(plain), ()
    built = experiment.build(warm, data.load(warm.data, warm.task))
    fresh, state = built.initial_state(), train.fresh_state(built)
    like = fresh.params["backbone"]["stage2"]
    saved, *_ = restore_params(plain / "checkpoints", {"params": {"stage2": like}})
    saved, ours = saved["params"]["stage2"], state.params["backbone"]["stage2"]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, saved, ours)))
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, like, ours)))
    same = jax.tree.map(np.array_equal, fresh.params["class_heads"], state.params["class_heads"])
    assert all(jax.tree.leaves(same))


def test_a_classifier_s_weights_go_into_the_backbone(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(configs.to_json(configs.defaults()))
    params = {"backbone": {"stem": np.zeros(2)}, "levels": {"0": np.zeros(2)}}
    abstract = types.SimpleNamespace(params=params)
    run = types.SimpleNamespace(abstract=abstract, config=configs.defaults())
    state = experiment.TrainState(0, 0, params, {"backbone": {}, "levels": {}}, (), {})
    given = {}

    def restore_net(folder, net):
        given.update(net)
        return {"params": {"stem": np.ones(2)}, "stats": {}}, {"stem": "has another shape"}

    monkeypatch.setattr(workdirs, "restore_net", restore_net)
    found = workdirs.warm_start(run, state, tmp_path)
    assert given == {"params": params["backbone"], "stats": {}}
    assert found.params["backbone"]["stem"].tolist() == [1, 1]
    assert found.params["levels"] is params["levels"] and found.stats["levels"] == {}


def test_bad_input_is_named(tmp_path):
    for given, message in (
        ("", "--mode=predict needs an image"),
        (tmp_path / "none", "there is no such file or folder"),
        (tmp_path, "there is no image in this folder"),
    ):
        with pytest.raises(UserError, match=message):
            _files(str(given))

"""FID and IS of a generator, by the features of a classifier that was trained here; its samples.

A classifier's features are what its last layer reads (over space the mean), its logits what that
gives. Inception's, by which published values are measured, cannot be assumed to be at hand: run
--mode=eval, whose workdir then holds `samples.npz` (`images`, uint8 `(samples, H, W, C)`, and
`step`), put features that any program made into another .npz and name it in a second --mode=eval:

    config.generation.features = 'file:PATH.npz'

    made      features of the samples, floats `(M, D)`
    real      features of real images, `(N, D)`; or else their mean `(D,)` and covariance `(D, D)`
              under `real_mean` and `real_covariance`
    logits    of the samples, `(M, classes)`, for IS; may be left out
    step      that of samples.npz, so that no other net gets their scores
"""

import functools
import pathlib
import zipfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efficient_nets import adversarial, data, layers, names, sharding, workdirs
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.feeding import eval_batches, put_resident
from efficient_nets.tasks import generation, image_scores
from efficient_nets.tasks.image_scores import Gaussian, Moments

FIELD = "generation.features"
FILE = "file:"
GRID_KEY, SAMPLES_KEY = 1, 2  # folded into that of config.seed


class FeatureNet:
    """A trained classifier, in evaluation mode.

    Args:
      run: The experiment whose images it looks at.

    Attributes:
      name: For people: architecture, data set, folder.
      net: Its arrays, which a program takes as an argument.
    """

    def __init__(self, run: Experiment):
        folder = names.local_folder(FIELD, run.config.generation.features)
        config = workdirs.read_config(FIELD, folder)
        if config.task != "classification":
            raise UserError(f"{FIELD}={folder}: it holds a run of task={config.task!r}")
        here, there = run.config.data.name, config.data.name
        if here != there:
            raise UserError(
                f"{FIELD}={folder}: it was trained on {there!r}; give a classifier of {here!r}"
            )
        config.data.dir = run.config.data.dir
        known = data.statistics_known(config.data)  # or only the images tell
        self._info = data.describe(config.data) if known else data.load(config.data).info
        self._graph, self.net = workdirs.trained_net(FIELD, folder, config, run)
        self.name = f"{config.model.name} on {there}, {folder}"

    def __call__(self, net, pixels: Array) -> tuple[Array, Array]:
        """Features `(N, D)` and logits `(N, classes)` of uint8 images."""
        calls = []
        model = nnx.merge(self._graph, net["params"], net["stats"])
        model.eval()
        model = layers.watched(model, lambda path, layer, x, y: calls.append(x))
        logits = model(data.normalise(pixels, self._info))
        features = calls[-1]
        return jnp.mean(features, axis=tuple(range(1, features.ndim - 1))), logits


class Judge:
    """What evaluators of all splits share: programs, and the classifier."""

    def __init__(self, run: Experiment):
        self._run = run
        self.features = FeatureNet(run)
        shape = jax.ShapeDtypeStruct((1, *run.dataset.info.image_shape), jnp.uint8)
        sizes = jax.eval_shape(self.features, self.features.net, shape)
        self._none = image_scores.no_moments(*(size.shape[-1] for size in sizes))
        self._gather = jax.jit(data.gather)
        self._add = jax.jit(self._added, donate_argnums=0)
        if jax.process_index() == 0:
            print(f"FID and IS are by the features of {self.features.name}", flush=True)

    def _added(self, found: Moments, net, pixels: Array, weights: Array) -> Moments:
        return image_scores.merged(
            found, image_scores.moments(*self.features(net, pixels), weights)
        )

    def over(self, batches: Iterator[tuple[Array, Array]]) -> Moments:
        """Of uint8 images with weights, on the host."""
        found = sharding.put_replicated(self._none, self._run.mesh)
        for pixels, weights in batches:
            found = self._add(found, self.features.net, pixels, weights)
        return Moments(*sharding.fetch(found))

    def real(self, split: str) -> Gaussian:
        resident = put_resident(self._run, split)
        batches = (self._gather(resident, batch) for batch in eval_batches(self._run, split))
        return image_scores.gaussian(
            self.over((batch["image"], batch["weight"]) for batch in batches)
        )


class Evaluator:
    """FID of samples against the images of one split, and their IS; nothing without features.

    Args:
      run: The experiment.
      split: Its name.
      judge: `Evaluator.compiled(run)`, which several evaluators may share.
    """

    def __init__(self, run: Experiment, split: str, judge: Judge | None):
        self.split = split
        self._run, self._judge, self._real = run, judge, None
        self._samples, self._grid, self._pictures = Sampler(run), Grid(run), {}

    @staticmethod
    def compiled(run: Experiment) -> Judge | None:
        features = run.config.generation.features
        return None if not features or features.startswith(FILE) else Judge(run)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`{'<split>/fid': x, '<split>/is': y}`, of the averaged net if there is one."""
        self._pictures = {f"samples-{int(state.step)}": self._grid(state)}
        features = self._run.config.generation.features
        if features.startswith(FILE):
            found = scores_of_file(pathlib.Path(features.removeprefix(FILE)), int(state.step))
        elif self._judge is None:
            found = {}
        else:
            if self._real is None:
                self._real = self._judge.real(self.split)
            made = self._judge.over(self._samples(state))
            found = {
                "fid": image_scores.frechet_distance(self._real, image_scores.gaussian(made)),
                "is": image_scores.inception_score(made),
            }
        return {f"{self.split}/{name}": value for name, value in found.items()}

    def pictures(self) -> dict[str, np.ndarray]:
        """Samples of the last call's state, of latents that are the same in all of a run."""
        return self._pictures


class Sampler:
    """The `generation.samples` images of a state, the same latents for each.

    Batches are of `evaluate.batch_size`, rounded up to what the devices divide.
    """

    def __init__(self, run: Experiment):
        self._run = run
        self._size = sharding.round_up(run.config.evaluate.batch_size, run.mesh)
        self._draw = jax.jit(functools.partial(drawn, run), static_argnums=2)

    def __call__(self, state: TrainState) -> Iterator[tuple[Array, np.ndarray]]:
        """uint8 images, and weights of 0 for those that are too many."""
        key = jax.random.fold_in(jax.random.key(self._run.config.seed), SAMPLES_KEY)
        for start in range(0, total := self._run.config.generation.samples, self._size):
            pixels = self._draw(state.net, jax.random.fold_in(key, start), self._size)
            yield pixels, (start + np.arange(self._size) < total).astype(np.float32)


def drawn(run: Experiment, net, key: Array, number: int) -> Array:
    """That many images, uint8, of a net in evaluation mode."""
    model = nnx.merge(run.graph, net["params"], net["stats"])
    model.eval()
    return generation.to_pixels(model.generator(adversarial.latents(run, key, number)))


class Grid:
    """`generation.grid` rows and columns of samples as one image, uint8 `(H, W, 3)`."""

    def __init__(self, run: Experiment):
        self._side = run.config.generation.grid
        number = sharding.round_up(self._side**2, run.mesh)
        key = jax.random.fold_in(jax.random.key(run.config.seed), GRID_KEY)
        self._draw = jax.jit(lambda net: drawn(run, net, key, number))

    def __call__(self, state: TrainState) -> np.ndarray:
        pixels = sharding.fetch(self._draw(state.net))[: self._side**2]
        pixels = np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
        return np.ascontiguousarray(tiled(pixels, self._side))


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Images `(rows * columns, H, W, C)` as one, `(rows * H, columns * W, C)`."""
    height, width, channels = images.shape[1:]
    images = images.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    return images.reshape(-1, columns * width, channels)


def write_samples(run: Experiment, state: TrainState, workdir: pathlib.Path) -> pathlib.Path:
    """`samples.npz`, see the module."""
    batches = [sharding.fetch(pixels)[weights > 0] for pixels, weights in Sampler(run)(state)]
    path = workdir / "samples.npz"
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, images=np.concatenate(batches), step=int(state.step))
    return path


def scores_of_file(path: pathlib.Path, step: int) -> dict[str, float]:
    """FID, and IS if there are logits, of features that another program made, see the module.

    Raises:
      UserError: if the file is none, lacks arrays, has some of other shapes, or is of another step.
    """
    field = f"{FIELD}={FILE}{path}"
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            given = dict(file)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{field}: it cannot be read as .npz: {error}") from error
    of_real = ("real",) if "real" in given else ("real_mean", "real_covariance")
    for name in ("made", "step", *of_real):
        if name not in given:
            raise UserError(f"{field}: it holds no {name!r}, but {', '.join(given) or 'nothing'}")
    if int(given["step"]) != step:
        raise UserError(f"{field}: its step={int(given['step'])}, the net's is {step}")
    for name, ndim in (("made", 2), ("real", 2), ("real_mean", 1), ("real_covariance", 2)):
        if name in given and (
            given[name].ndim != ndim or given[name].shape[-1] != given["made"].shape[-1]
        ):
            raise UserError(
                f"{field}: {name} is {given[name].shape} beside made {given['made'].shape}"
            )
        if name in given and not np.all(np.isfinite(given[name])):
            raise UserError(f"{field}: {name} has values that are not finite")
        if name in ("made", "real") and name in given and len(given[name]) < 2:
            raise UserError(f"{field}: {name} has {len(given[name])} rows, of at least 2")
    if "logits" in given and (given["logits"].ndim != 2 or not len(given["logits"])):
        raise UserError(f"{field}: logits is {given['logits'].shape}, of (samples, classes)")
    made = _gaussian(given["made"])
    real = _gaussian(given["real"]) if "real" in given else Gaussian(*(given[x] for x in of_real))
    found = {"fid": image_scores.frechet_distance(real, made)}
    if "logits" in given:
        found["is"] = image_scores.inception_score(_of_logits(given["logits"]))
    return found


def _gaussian(features: np.ndarray) -> Gaussian:
    features = features.astype(np.float64)
    return Gaussian(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def _of_logits(logits: np.ndarray) -> Moments:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    p = np.exp(log_p)
    return Moments(len(p), None, None, p.sum(axis=0), np.sum(p * log_p))

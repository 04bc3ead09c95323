"""Checkpoints of a whole training state, verified when they are read.

A checkpoint is a directory `<directory>/<step>` with two items: `state`, the leaves as Orbax writes
them, each under its path ("params/stem/kernel"), and `record`, one JSON object:

    {"step", "meta", "metrics", "leaves": {path: [dtype, shape, sum, hash]}, "digest"}

Orbax commits a directory by renaming it, so a killed run leaves a temporary directory, never half a
checkpoint. What befalls a committed one later it notices only in part: a chunk that is gone reads
as zeros. So `sum` and `hash` are taken on the device from the arrays that are saved, and again from
those that are restored; `digest` guards the record itself.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from efficient_nets import paths
from efficient_nets.errors import UserError
from efficient_nets.ops.checksum import checksum

BEST_METRIC = "validation/accuracy"
SIGNS = {"max": 1, "min": -1}  # by which a metric is greatest where it is best


class CheckpointError(UserError):
    """A checkpoint cannot be written or read: names the directory, the step and the reason."""


class _Mismatch(CheckpointError):
    """A sound checkpoint of another state: an older one would not help."""


class Checkpoints:
    """The checkpoints in one directory: the last `keep`, and the best by `best_metric`.

    In a run of several processes each makes one and calls the same methods in the same order.

    Args:
      directory: on a file system that all processes share.
      keep: how many of the newest are kept, at least 1. Damaged ones do not count, and go.
      best_metric: a name in `metrics`; the checkpoint where it is best is kept as well.
      best_mode: whether the best is the greatest, 'max', or the least, 'min'.
      create: makes the directory, and clears it of what a killed run left unfinished. False is for
        readers: it writes nothing, so the run that owns the directory may be going on.

    Raises:
      CheckpointError: the directory cannot be written.
    """

    def __init__(
        self,
        directory,
        *,
        keep: int = 3,
        best_metric: str = BEST_METRIC,
        best_mode: str = "max",
        create: bool = True,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to be kept")
        if best_mode not in SIGNS:
            raise ValueError(f"best_mode={best_mode!r}: allowed are {', '.join(SIGNS)}")
        self.directory = Path(directory).absolute()
        self.keep, self.best_metric, self.best_mode = keep, best_metric, best_mode
        self._manager = None
        self._saving: int | None = None  # the step that is being written in the background
        self._last: dict = {}  # the record last written or verified
        self._scores: dict[int, float] = {}
        logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
        if create:
            with self._failing("open"):
                self._open()

    def _open(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            probe = self.directory / ".probe"  # a read-only disk is better known now than at a save
            probe.touch()
            probe.unlink()
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                logging.warning("removing a checkpoint that was never finished: %s", path)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            cleanup_tmp_directories=True,
            create=False,
            single_host_load_and_broadcast=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        steps = self._manager.all_steps()
        scores = np.array([self._score(step) for step in steps], np.float32)
        scores = multihost_utils.broadcast_one_to_all(scores)  # all have to delete the same
        self._scores = dict(zip(steps, scores.tolist(), strict=True))

    def save(self, step: int, state, *, meta: dict, metrics: dict[str, float] | None = None):
        """Copies `state` to the host and returns; it is written in the background.

        First waits for the save before this one. A step that was saved already is replaced, or left
        alone where nothing in it changed (SIGTERM just after a regular save).

        Args:
          state: pytree of `jax.Array`, without typed PRNG keys (save their `key_data`).
          meta: any JSON object; `restore` returns it.
          metrics: holds `best_metric`, or this checkpoint cannot be the best.

        Raises:
          CheckpointError: this save or the one before it failed, the disk being full for example.
        """
        if self._manager is None:
            raise ValueError(f"{self.directory} was opened with create=False, for reading only")
        self.wait()
        leaves, _ = _flatten(state)
        for path, x in leaves.items():
            plain = isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
            if not plain or not x.size:
                form = _form(x) if hasattr(x, "dtype") else x
                raise ValueError(
                    f"state leaf {path!r}: need a jax.Array of one or more numbers, "
                    f"got {type(x).__name__} {form}"
                )
        table = _table(leaves)
        if metrics is None and (step, table) == (self._last.get("step"), self._last.get("leaves")):
            metrics = self._last["metrics"]
        metrics = metrics and {name: float(value) for name, value in metrics.items()}
        record = json.loads(json.dumps(dict(step=step, meta=meta, metrics=metrics, leaves=table)))
        record["digest"] = _digest(record)
        if record["digest"] == self._last.get("digest"):
            return
        self._saving, self._scores[step] = step, self._rank(record)
        items = dict(state=ocp.args.PyTreeSave(leaves), record=ocp.args.JsonSave(record))
        with self._failing(f"save step {step} in"):
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._last = record

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax asks, oldest first, which to keep when the newest is committed."""
        sound = [info.step for info in checkpoints if self._scores[info.step] < math.inf]
        best = max(sound, key=lambda step: (self._scores[step], step))
        return [info.step == best or info.step in sound[-self.keep :] for info in checkpoints]

    def wait(self):
        """Returns when nothing is being written; raises `CheckpointError` if that failed."""
        step, self._saving = self._saving, None
        if step is not None:
            with self._failing(f"save step {step} in"):
                self._manager.wait_until_finished()

    def close(self):
        """`wait`, and stops the threads that write."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()

    @contextlib.contextmanager
    def _failing(self, action: str):
        try:
            yield
        except Exception as error:  # OSError, or what tensorstore makes of it
            self._last = {}
            raise CheckpointError(f"cannot {action} {self.directory}: {_reason(error)}") from error

    def steps(self) -> list[int]:
        """The committed steps in ascending order, sound or not."""
        found = ocp.path.step.standard_name_format().find_all(self.directory)
        return sorted(metadata.step for metadata in found)

    def restore(self, abstract, which: str | int = "newest"):
        """The newest sound checkpoint, the best one, or that of a step, on the devices of today.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` of the whole state, each with the sharding it
            shall have; another than when it was saved, over other devices, is fine.
          which: "newest", "best" or a step. For the first two a damaged one is passed over with a
            warning, and the next newest or next best taken.

        Returns:
          `(state, meta, step)`; None only if the directory holds no checkpoint at all.

        Raises:
          CheckpointError: no such step (lists those there are), or every candidate is damaged, or
            the checkpoint is of another state than `abstract`.
        """
        self.wait()
        asked, treedef = _flatten(abstract)
        if (found := self._restore(asked, which, whole=True)) is None:
            return None
        leaves, self._last = found
        state = treedef.unflatten(leaves[path] for path in asked)
        return state, self._last["meta"], self._last["step"]

    def _restore(self, asked: dict, which, **fit) -> tuple[dict, dict] | None:
        steps = _of_process_0(self.steps()[::-1])
        if which not in ("newest", "best", *steps):
            reason = f"which={which!r}: allowed are 'newest', 'best' and its steps {steps}"
            raise CheckpointError(f"{self.directory}: {reason}")
        if not steps:
            return None
        candidates = [which]
        if which == "newest":
            candidates = steps
        elif which == "best" and not (candidates := self._by_score(steps)):
            reason = f"none of the steps {steps} has the metric {self.best_metric!r}"
            raise CheckpointError(f"{self.directory}: {reason}")
        for step in candidates:
            try:
                return _read(self.directory, step, asked, **fit)
            except _Mismatch:
                raise
            except Exception as error:
                reason = f"{self.directory}/{step} is damaged: {_reason(error)}"
                logging.warning(reason)
                self._scores[step] = math.inf
        raise CheckpointError(f"no sound checkpoint among the steps {candidates}: {reason}")

    def _by_score(self, steps: list[int]) -> list[int]:
        """Best first; before it those that cannot be read, so that they are reported as others."""
        scores = {step: self._score(step) for step in steps}
        ranked = sorted(steps, key=lambda step: (scores[step], step), reverse=True)
        return _of_process_0([step for step in ranked if scores[step] > -math.inf])

    def _score(self, step: int) -> float:
        """`_rank` of a saved step; inf if its record is damaged."""
        try:
            return self._rank(_read_record(self.directory, step))
        except Exception:
            return math.inf

    def _rank(self, record: dict) -> float:
        """The metric with the sign that makes the best the greatest; -inf if it has none."""
        score = float(np.float32((record["metrics"] or {}).get(self.best_metric, math.nan)))
        return SIGNS[self.best_mode] * score if math.isfinite(score) else -math.inf


def restore_params(
    directory,
    like,
    which: str | int = "newest",
    *,
    partial: bool = False,
    best_metric: str = BEST_METRIC,
    best_mode: str = "max",
) -> tuple:
    """Part of the state that another run saved in `directory`, without knowing the rest of it.

    Args:
      like: pytree with the outer names of the saved state, `{"params": ..., "stats": ...}`; leaves
        are `jax.ShapeDtypeStruct` or arrays, of the shape, dtype and sharding to restore.
      which: as in `Checkpoints.restore`.
      partial: True leaves a leaf that the checkpoint does not have, or has with another shape or
        dtype, as it is in `like`; False makes it an error.
      best_metric, best_mode: as of `Checkpoints`, for `which` of 'best'.

    Returns:
      `(tree, left, step)`: `like` with the leaves restored, and `{path: reason}` of those left.

    Raises:
      CheckpointError: there is no checkpoint, or no sound one, or it does not fit `like`; also
        where `partial` if not a single leaf fits.
    """
    asked, treedef = _flatten(like)
    checkpoints = Checkpoints(directory, best_metric=best_metric, best_mode=best_mode, create=False)
    if (found := checkpoints._restore(asked, which, partial=partial)) is None:
        raise CheckpointError(f"{directory} holds no checkpoint")
    leaves, record = found
    tree = treedef.unflatten(leaves.get(path, leaf) for path, leaf in asked.items())
    return tree, _differences(asked, record["leaves"]), record["step"]


def _read(directory, step: int, asked: dict, whole=False, partial=False) -> tuple[dict, dict]:
    """The leaves asked for, verified, and the record; all processes fail if one of them does."""
    leaves, record, error = {}, {}, None
    try:
        record = _read_record(directory, step)
        left = _differences(asked, record["leaves"], whole)
        if left and not (partial and len(left) < len(asked)):
            few = "; ".join(f"{path} {reason}" for path, reason in list(left.items())[:5])
            raise _Mismatch(f"{directory}/{step} holds another state ({len(left)} leaves): {few}")
        wanted = {path: leaf for path, leaf in asked.items() if path not in left}
        leaves = _read_leaves(directory / str(step) / "state", wanted)
    except Exception as problem:
        error = problem
    if np.any(multihost_utils.process_allgather(np.array(error is not None))):
        raise error or CheckpointError("another process cannot read it")
    table = _table(leaves)
    if wrong := [path for path in table if table[path] != record["leaves"][path]]:
        raise CheckpointError(f"bits changed in {wrong}")
    return leaves, record


def _read_leaves(directory, wanted: dict) -> dict:
    def as_asked(leaf):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    args = {path: as_asked(leaf) for path, leaf in wanted.items()}
    args = ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
    # The bare handler has no barriers, where a failure on one host would hang the others.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry).restore(directory, args=args)


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Where a read fails, lets the others end first: abandoned, each would die with a traceback."""

    async def deserialize(self, infos, args=None):
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        finally:
            while others := asyncio.all_tasks() - before:
                await asyncio.wait(others)


def _read_record(directory, step: int) -> dict:
    record = json.loads((directory / str(step) / "record" / "metadata").read_text())
    if record.get("digest") != _digest(record) or record["step"] != step:
        raise CheckpointError("its record was changed")
    return record


def _digest(record: dict) -> str:
    body = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _table(leaves: dict) -> dict:
    """Form and checksums of each leaf, `{path: [dtype, shape, sum, hash]}`."""
    # One at a time: of many small programs in flight, each of which sums over processes, every
    # process may wait for another one, for ever.
    sums = {path: jax.device_get(checksum(leaf)) for path, leaf in leaves.items()}
    return {path: [*_form(leaf), *map(int, sums[path])] for path, leaf in leaves.items()}


def _flatten(tree) -> tuple[dict, jax.tree_util.PyTreeDef]:
    flat = paths.named_leaves(tree)
    treedef = jax.tree.structure(tree)
    if len(flat) != treedef.num_leaves:
        raise ValueError("two leaves have the same path: a name in the state must not hold '/'")
    return flat, treedef


def _form(leaf) -> list:
    return [str(leaf.dtype), list(leaf.shape)]


def _differences(asked: dict, saved: dict, whole: bool = False) -> dict[str, str]:
    """`{path: reason}` of the leaves that were not saved as asked for, or not asked for."""
    found = {path: "is only in the checkpoint" for path in saved if whole and path not in asked}
    for path, leaf in asked.items():
        if path not in saved:
            found[path] = "is not in the checkpoint"
        elif saved[path][:2] != _form(leaf):
            found[path] = f"is {saved[path][:2]} in the checkpoint and {_form(leaf)} here"
    return found


def _of_process_0(steps: list[int]) -> list[int]:
    """Its list on every process: on a network file system each may see another directory."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]


def _reason(error: Exception) -> str:
    error = error.__cause__ or error  # Orbax puts its own before tensorstore's
    name = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{name}{error}", 1000)


def _is_not_orbax_chatter(record) -> bool:
    return record.levelname != "INFO" or "orbax" not in record.pathname

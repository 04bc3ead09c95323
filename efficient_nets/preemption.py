"""SIGTERM: finish the step, save, leave. All processes of a run stop at the same step."""

import signal
import sys

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Takes SIGTERM while it is open. With several processes JAX's own service takes it."""

    def __init__(self):
        self._signalled = False
        self._before = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _take(self, *_) -> None:
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every process."""
        if jax.process_count() == 1:
            return self._signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def exit(self) -> None:
        """Ends with the status that SIGTERM gives, so that schedulers start the job again."""
        sys.exit(128 + signal.SIGTERM)

"""SIGTERM: finish the step, save, leave. All processes of a run stop at the same step."""

import signal
import sys

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Takes SIGTERM while it is open. With several processes JAX's own service takes it."""

    _calls = 0  # of the whole process, as JAX counts: it may train several runs

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

    def reached(self) -> bool:
        """Whether to stop here; the same answer on every process. Called after every dispatch."""
        if jax.process_count() == 1:
            return self._signalled
        # JAX agrees on the highest number that a process has given it, 0 at the start, plus one,
        # and is true at that number alone: steps, of which a dispatch or a resumed run skips some,
        # could miss it.
        Preemption._calls += 1
        return multihost_utils.reached_preemption_sync_point(Preemption._calls)

    def exit(self) -> None:
        """Ends with the status that SIGTERM gives, so that schedulers start the job again."""
        sys.exit(128 + signal.SIGTERM)

"""SIGTERM in a run of several processes, against a model of JAX's service."""

import jax
import pytest
from jax.experimental import multihost_utils

from efficient_nets.preemption import Preemption


class Service:
    """As in XLA: a signal sets the sync point after the number last given, from 0."""

    def __init__(self):
        self.number, self.sync_point = 0, None

    def signal(self):
        self.sync_point = self.number + 1

    def reached(self, number):
        self.number = number
        return number == self.sync_point


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    return service


@pytest.mark.parametrize("dispatches", [0, 1, 5])
def test_a_signal_stops_after_the_next_dispatch_even_before_the_first(service, dispatches):
    with Preemption() as preemption:
        assert not any(preemption.reached() for _ in range(dispatches))
        service.signal()
        assert preemption.reached()

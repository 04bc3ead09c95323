"""Ranges for values that are known, beside the same in NumPy and float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.ops import quantizers
from efficient_nets.ops.quantizers import ranges

SHAPE = (2, 300, 2)  # (N, W, C), one range a channel


def make(method="minmax", levels=16, **fields):
    return quantizers.make("input", dict(method=method, levels=levels, per="channel", **fields))


def values(kind, seed=0):
    """Each channel is wider than the one before; with a value far off, which should be cut."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=SHAPE) * [1.0, 4.0]
    if kind == "skewed":
        x = 1 + np.maximum(x, 0.1 * x)
    x[0, 0] = [8.0, 32.0]
    return x


def checked(spec, x, found, expected):
    """`expected(values of a channel)` is what was found for it."""
    for i, lo_hi in enumerate(zip(*found, strict=True)):
        # Of float64: sums of 600 terms.
        np.testing.assert_allclose(lo_hi, expected(x[:, :, i].ravel()), rtol=1e-10, atol=1e-10)


def test_percentiles(x64):
    def quantile(x, share):
        """Between the two values that are next to this share of their number."""
        x, place = sorted(x), share * (len(x) - 1)
        below = math.floor(place)
        above = min(below + 1, len(x) - 1)
        return x[below] + (place - below) * (x[above] - x[below])

    x = values("normal")
    found = ranges.percentile(make(), jnp.asarray(x))
    checked(make(), x, found, lambda x: (quantile(x, 0.0001), quantile(x, 0.9999)))
    assert np.all(found[0] > x.min((0, 1))) and np.all(found[1] < x.max((0, 1)))


@pytest.mark.parametrize("zero_point", [False, True])
def test_the_share_of_least_error(zero_point, x64):
    spec, x = make(zero_point=zero_point, levels=4), values("normal")

    def error(x, lo, hi):
        scale = (hi - lo if zero_point else hi) / 3
        zero = round(min(max(-lo / scale, 0), 3)) if zero_point else 0
        return sum((min(max(round(one / scale), -zero), 3 - zero) * scale - one) ** 2 for one in x)

    def expected(x):
        shares = [(i + 1) / 40 for i in range(40)]
        share = min(shares, key=lambda s: error(x, min(x) * s, max(x) * s))
        assert share < 1
        return min(x) * share, max(x) * share

    observed = quantizers.calibrate(spec, jnp.asarray(x), "mse").observed
    checked(spec, x, (observed["lo"], observed["hi"]), expected)


def divergence(counts, begin, end, steps):
    """sum P log(P / Q) of the histogram between two bins; see `ranges.entropy`."""
    kept = counts[begin:end]
    p = list(kept)
    p[0] += sum(counts[:begin])
    p[-1] += sum(counts[end:])
    q, number = [0.0] * len(p), end - begin
    of_step = [i * steps // number for i in range(number)]
    for step in range(steps):
        bins = [i for i in range(number) if of_step[i] == step]
        holds = [i for i in bins if p[i] > 0]
        for i in holds:
            q[i] = sum(kept[j] for j in bins) / len(holds)
    p, q = np.array(p) / sum(p), np.array(q) / max(sum(q), 1e-30)
    return sum(a * math.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0)


ENTROPY = {  # what is counted, the steps, and whether there are two limits
    "signed": (dict(signed=True), np.abs, 7, False),
    "unsigned": (dict(), lambda x: x[x >= 0], 15, False),
    "zero point": (dict(zero_point=True), lambda x: x, 15, True),
    "few levels": (dict(zero_point=True, levels=3), lambda x: x, 2, True),
    "offset": (dict(method="lsq+"), lambda x: x, 15, True),
    "signed offset": (dict(method="lsq+", signed=True), lambda x: x, 15, True),
    "staged": (dict(levels=4, stages=((0, 8), (1, 4))), lambda x: x[x >= 0], 7, False),
}


@pytest.mark.parametrize("name", ENTROPY)
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_the_limits_of_least_divergence(name, kind, x64, monkeypatch):
    fields, counted, steps, two = ENTROPY[name]
    bins = 128
    monkeypatch.setattr(ranges, "BINS", bins)
    spec, x = make(**fields), values(kind)

    def expected(x):
        x = counted(x)
        base, width = (x.min(), x.max() - x.min()) if two else (0.0, x.max())
        counts = [0] * bins
        for one in x:
            counts[min(int((one - base) / width * bins), bins - 1)] += 1
        first, middle = max(steps, bins // 64), 0
        while two and 2 * sum(counts[: middle + 1]) < len(x):
            middle += 1
        ends = [max(end, middle + 1) for end in range(first, bins + 1)]
        end = min(ends, key=lambda end: divergence(counts, 0, end, steps))
        begins = [min(begin, middle, end - first) for begin in range(bins - first + 1)]
        begin = min(begins, key=lambda begin: divergence(counts, begin, end, steps)) if two else 0
        lo, hi = base + width * begin / bins, base + width * end / bins
        assert hi < x.max()  # the far value is cut
        return (lo if two else -hi if spec.signed else 0.0), hi

    checked(spec, x, ranges.entropy(spec, jnp.asarray(x)), expected)


def test_what_is_calibrated_covers_both_sides(monkeypatch):
    """Of a normal distribution 3 or 4 deviations; the values are all alike in another channel."""
    monkeypatch.setattr(ranges, "BINS", 256)
    x = np.full((2, 2000, 3), -2.0, np.float32)
    x[:, :, 1], x[:, :, 2] = 0.0, np.random.default_rng(0).normal(size=(2, 2000))
    found = quantizers.calibrate(make(zero_point=True), jnp.asarray(x), "entropy").observed
    assert -4 < found["lo"][2] < -2.5 and 2.5 < found["hi"][2] < 4
    lo, hi = ranges.entropy(make(), jnp.asarray(x))  # nothing is counted in the first channel
    for array in (*found.values(), lo, hi):
        assert np.all(np.isfinite(array))

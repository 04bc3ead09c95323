"""Quantizers written out in Python loops over floats: values and the gradient of every array.

Inputs and steps are multiples of powers of two, so that half steps and thresholds are exact and a
code that differs by one step is not taken for rounding.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.ops import linear_maps, quantizers

pytestmark = pytest.mark.every_case

# Of float64: a few hundred operations of 1.1e-16 each. A wrong code is off by a whole step.
TOLERANCE = 1e-12
SHAPES = {"kernel": (2, 4, 4), "input": (2, 3, 4), "output": (2, 3, 4), "gradient": (2, 3, 4)}


class Case:
    """A quantizer's fields, the group of each value, and how many values a group has."""

    def __init__(self, site, method, **fields):
        self.site, self.method, self.fields, self.shape = site, method, fields, SHAPES[site]
        self.spec = quantizers.make(site, {"method": method, **fields})
        axis = 1 if self.spec.axis == "in" else 2
        kind, _, number = self.spec.per.partition(":")
        channels = self.shape[axis]
        together = {"layer": channels, "channel": 1, "groups": 0, "size": 0}[kind]
        if kind == "groups":
            together = channels // int(number)
        elif kind == "size":
            together = int(number)
        self.positions = list(itertools.product(*map(range, self.shape)))
        self.group = [position[axis] // together for position in self.positions]
        self.groups = channels // together
        self.low, self.high = 0, self.spec.levels - 1
        if self.spec.signed:
            self.low, self.high = -(self.spec.levels // 2), (self.spec.levels - 1) // 2
        if self.spec.signed and self.spec.levels == 2:
            self.low, self.high = -1, 1

    def __repr__(self):
        fields = " ".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.site} {self.method} {fields}"

    def members(self, group):
        return [i for i, own in enumerate(self.group) if own == group]

    def total(self, values):
        return [math.fsum(values[i] for i in self.members(g)) for g in range(self.groups)]

    def mean(self, values):
        return [total / len(self.members(g)) for g, total in enumerate(self.total(values))]

    def each(self, figures):
        """The figure of its group, for each value."""
        return [figures[group] for group in self.group]


def nearest(u, low, high):
    return round(min(max(u, low), high))  # ties go to even


def sign(x):
    return 1 if x >= 0 else -1


def slopes(gradient, us, low, high):
    """Pseudo-derivatives of the codes."""
    inside = [1.0 if low < u < high else 0.0 for u in us]
    if gradient == "scaled":
        return [each * sum(inside) / len(inside) for each in inside]
    if gradient == "triangle":
        return [max(2 - 2 * abs(u), 0) for u in us]
    if gradient == "swish":  # arXiv 1812.11800, equation 9
        return [
            5 * (2 - 5 * u * math.tanh(5 * u / 2)) / (1 + math.cosh(5 * u)) if abs(u) < 100 else 0
            for u in us
        ]
    return {"identity": [1.0] * len(us), "clipped": inside}[gradient]


# Each returns the values, the gradient of x and those of the learned arrays.


def stepped(case, xs, gs, steps, low, high):
    """Codes times steps, one step a value: `ds = g (code - slope u)`, one a value too."""
    us = [x / step for x, step in zip(xs, steps, strict=True)]
    binary = case.spec.signed and case.spec.levels == 2
    codes = [sign(u) if binary else nearest(u, low, high) for u in us]
    ks = slopes(case.spec.gradient, us, low, high)
    values = [code * step for code, step in zip(codes, steps, strict=True)]
    dx = [g * k for g, k in zip(gs, ks, strict=True)]
    ds = [g * (code - (k * u if k else 0)) for g, code, k, u in zip(gs, codes, ks, us, strict=True)]
    return values, dx, ds


def power_of_two(steps):
    return [2.0 ** round(math.log2(step)) for step in steps]


def step_gradient(case):
    """Factor of a step's gradient: N are the values of a group, of an input those of a sample."""
    n = len(case.members(0)) / (1 if case.site == "kernel" else case.shape[0])
    fan = math.prod(case.shape[:-1]) if case.site == "kernel" else case.shape[-1]
    return {
        "paper": 1 / math.sqrt(n * case.high),
        "none": 1.0,
        "1/sqrt(n)": 1 / math.sqrt(n),
        "sqrt(n)": math.sqrt(n),
        "1/sqrt(fan)": 1 / math.sqrt(fan),
        "sqrt(fan)": math.sqrt(fan),
    }[case.spec.step_gradient]


def lsq(case, xs, gs, arrays):
    """With log_step `s = 2^t`, `dt = ds s ln 2`; a power of two has the slope of what it is of."""
    logarithms = case.spec.option("log_step")
    learned = [2.0**t for t in arrays["log_step"]] if logarithms else arrays["step"]
    steps = power_of_two(learned) if case.spec.power_of_two else learned
    values, dx, ds = stepped(case, xs, gs, case.each(steps), case.low, case.high)
    ds = [step_gradient(case) * each for each in case.total(ds)]
    if not logarithms:
        return values, dx, {"step": ds}
    dt = [d * s * math.log(2) for d, s in zip(ds, learned, strict=True)]
    return values, dx, {"log_step": dt}


def lsq_plus(case, xs, gs, arrays):
    """With an offset: `round((x - offset) / s) s + offset`, whose gradient is `1 - slope`."""
    if "offset" not in arrays:
        return lsq(case, xs, gs, arrays)
    offsets = case.each(arrays["offset"])
    shifted = [x - offset for x, offset in zip(xs, offsets, strict=True)]
    values, dx, learned = lsq(case, shifted, gs, arrays)
    values = [value + offset for value, offset in zip(values, offsets, strict=True)]
    outside = case.total([g - d for g, d in zip(gs, dx, strict=True)])
    return values, dx, learned | {"offset": [step_gradient(case) * each for each in outside]}


def minmax(case, xs, gs, arrays):
    low, high, steps, zeros = case.low, case.high, [], []
    for lo, hi in zip(arrays["lo"], arrays["hi"], strict=True):
        span = max(-lo, hi) / ((case.spec.levels - 1) / 2) if case.spec.signed else hi / high
        step = (hi - lo) / high if case.spec.zero_point else span
        steps.append(power_of_two([step])[0] if case.spec.power_of_two else step)
        zeros.append(nearest(-lo / steps[-1], low, high) if case.spec.zero_point else 0)
    values, dx = [], []
    for i, group in enumerate(case.group):  # each group has a range of codes of its own
        one = stepped(
            case, [xs[i]], [gs[i]], [steps[group]], low - zeros[group], high - zeros[group]
        )
        values += one[0]
        dx += one[1]
    if case.spec.gradient == "scaled":
        inside = [
            low - zeros[group] < x / steps[group] < high - zeros[group]
            for x, group in zip(xs, case.group, strict=True)
        ]
        dx = [g * k * sum(inside) / len(xs) for g, k in zip(gs, inside, strict=True)]
    return values, dx, {}


def dorefa(case, xs, gs, arrays):
    """`round(clip(x, 0, c) (L-1) / c) c / (L-1)`; the gradient stops outside of [0, c]."""
    clip, steps = case.spec.option("clip"), case.spec.levels - 1
    values = [round(min(max(x, 0), clip) * steps / clip) * clip / steps for x in xs]
    return values, [g if 0 <= x <= clip else 0 for x, g in zip(xs, gs, strict=True)], {}


def dorefa_kernel(case, xs, gs, arrays):
    """`2 round((L-1) t) / (L-1) - 1`, `t = tanh w / (2 max |tanh w|) + 1/2`."""
    if case.spec.levels == 2:
        scales = case.each(case.mean([abs(x) for x in xs]))
        return [sign(x) * scale for x, scale in zip(xs, scales, strict=True)], gs, {}
    steps = case.spec.levels - 1
    values, dx = [0.0] * len(xs), [0.0] * len(xs)
    for group in range(case.groups):
        members = case.members(group)
        tanh = {i: math.tanh(xs[i]) for i in members}
        most = max(map(abs, tanh.values()))
        ties = [i for i in members if abs(tanh[i]) == most]
        # 0 / 0 in a group of zeros: nothing is divided then, nor has the largest a gradient.
        of_most = sum(gs[i] * tanh[i] for i in members) / most**2 if most else 0.0
        for i in members:
            t = tanh[i] / (2 * (most or 1.0)) + 0.5
            values[i] = 2 * round(t * steps) / steps - 1
            slope = gs[i] / (most or 1.0)  # of 2 t with respect to tanh
            if i in ties:  # the gradient of max |tanh| is shared by those that are it
                slope -= of_most * math.copysign(1, tanh[i]) / len(ties)
            dx[i] = slope * (1 - tanh[i] ** 2)
    return values, dx, {}


def pact(case, xs, gs, arrays):
    """x in [0, alpha), alpha's gradient is 1 from there on; signed -1 below -alpha."""
    values, dx, dalpha = [], [], []
    for x, g, alpha in zip(xs, gs, case.each(arrays["alpha"]), strict=True):
        floor = -alpha if case.spec.signed else 0.0
        low = -case.high if case.spec.signed else 0
        values.append(nearest(x / (alpha / case.high), low, case.high) * (alpha / case.high))
        dx.append(g if floor <= x < alpha else 0.0)
        dalpha.append(g if x >= alpha else -g if case.spec.signed and x < floor else 0.0)
    return values, dx, {"alpha": case.total(dalpha)}


def kbit(case, xs, gs, arrays):
    """`clip(round(x m), -m, m - 1) / m`, m = 2^(k-1)."""
    m = case.spec.levels // 2
    return *stepped(case, xs, gs, [1 / m] * len(xs), -m, m - 1)[:2], {}


def quantized_relu(case, xs, gs, arrays):
    """`clip(2 round(hardsigmoid(x) 2^k) / 2^k - 1, 0, 1 - 2^(1-k))`, with L = 2^(k-1) values."""
    two_k = 2 * case.spec.levels
    values = []
    for x in xs:
        if case.spec.levels % 2:  # no power of two: half steps go to even codes
            values.append(nearest(x * two_k / 2, 0, two_k / 2 - 1) / (two_k / 2))
            continue
        sigmoid = min(max((x + 1) / 2, 0), 1)
        values.append(min(max(2 * round(sigmoid * two_k) / two_k - 1, 0), 1 - 2 / two_k))
    ks = slopes(case.spec.gradient, [x * two_k / 2 for x in xs], 0, two_k / 2 - 1)
    return values, [g * k for g, k in zip(gs, ks, strict=True)], {}


def signs(case, xs, gs, arrays, scales=None, code=sign, extra=0.0):
    """`sign(x) scale`, `dx = g (scale slope + extra)`."""
    scales = scales or [1.0] * len(xs)
    values = [code(x) * scale for x, scale in zip(xs, scales, strict=True)]
    ks = slopes(case.spec.gradient, xs, -1, 1)
    dx = [g * (scale * k + extra) for g, scale, k in zip(gs, scales, ks, strict=True)]
    return values, dx, {}


def binarize(case, xs, gs, arrays):
    def code(x):
        return 2 * round(min(max((x + 1) / 2, 0), 1)) - 1

    return signs(case, xs, gs, arrays, code=code)


def ternarize(case, xs, gs, arrays):
    return signs(case, xs, gs, arrays, code=lambda x: 1 if x > 0.5 else -1 if x <= -0.5 else 0)


def xnor_kernel(case, xs, gs, arrays):
    """`dw = g (1/n + mean |w| slope)`."""
    scales = case.each(case.mean([abs(x) for x in xs]))
    return signs(case, xs, gs, arrays, scales, extra=1 / len(case.members(0)))


def bireal_kernel(case, xs, gs, arrays):
    return signs(case, xs, gs, arrays, case.each(case.mean([abs(x) for x in xs])))


def xnor_input(case, xs, gs, arrays):
    shared = {"channel": (0, 1), "spatial": (0, 2)}.get(case.spec.option("k"))
    if shared is None:
        return signs(case, xs, gs, arrays)
    scales = []
    for mine in case.positions:
        sizes = [
            abs(x)
            for x, other in zip(xs, case.positions, strict=True)
            if all(mine[axis] == other[axis] for axis in shared)
        ]
        scales.append(sum(sizes) / len(sizes))
    return signs(case, xs, gs, arrays, scales)


def xnor_plus_kernel(case, xs, gs, arrays):
    """`sign(w) gamma`, one gamma an output channel."""
    channel = [position[-1] for position in case.positions]
    scales = [arrays["gamma"][c] for c in channel]
    values, dx, _ = signs(case, xs, gs, arrays, scales)
    gamma = [0.0] * case.shape[-1]
    for x, g, c in zip(xs, gs, channel, strict=True):
        gamma[c] += g * sign(x)
    return values, dx, {"gamma": gamma}


def twn(case, xs, gs, arrays):
    sizes = [abs(x) for x in xs]
    thresholds = case.each([0.7 * mean for mean in case.mean(sizes)])
    kept = [size > threshold for size, threshold in zip(sizes, thresholds, strict=True)]
    alphas = [
        total / max(number, 1)
        for total, number in zip(
            case.total([size * keep for size, keep in zip(sizes, kept, strict=True)]),
            case.total([float(keep) for keep in kept]),
            strict=True,
        )
    ]
    values = [
        sign(x) * alpha if keep else 0.0
        for x, keep, alpha in zip(xs, kept, case.each(alphas), strict=True)
    ]
    return values, gs, {}


def ttq(case, xs, gs, arrays):
    values, dx, positive, negative = [], [], [], []
    for i, (x, g) in enumerate(zip(xs, gs, strict=True)):
        members = case.members(case.group[i])
        threshold = case.spec.option("threshold") * max(abs(xs[j]) for j in members)
        up, down = (arrays[name][case.group[i]] for name in ("positive", "negative"))
        above, below = x > threshold, x < -threshold
        values.append(up if above else -down if below else 0.0)
        dx.append(g * (up if above else down if below else 1.0))
        positive.append(g if above else 0.0)
        negative.append(-g if below else 0.0)
    return values, dx, {"positive": case.total(positive), "negative": case.total(negative)}


def lq_levels(case, basis):
    """The 2^K sums of the basis, each with its bits, in rising order."""
    bits = (-1, 1) if case.spec.signed else (0, 1)
    levels = [
        (sum(bit * each for bit, each in zip(code, basis, strict=True)), code)
        for code in itertools.product(bits, repeat=len(basis))
    ]
    return sorted(levels, key=lambda level: level[0])


def lq_nearest(levels, x):
    """The level that has x, thresholds at the midpoints: in (t_i, t_i+1], LQ-Nets section 3.1."""
    found = levels[0]
    for below, above in itertools.pairwise(levels):
        if x > (below[0] + above[0]) / 2:
            found = above
    return found


def lq(case, xs, gs, arrays):
    values, dx = [], []
    for x, g, group in zip(xs, gs, case.group, strict=True):
        levels = lq_levels(case, arrays["basis"][group])
        values.append(lq_nearest(levels, x)[0])
        size = abs(x) if case.spec.signed else x
        dx.append(g if case.spec.gradient == "identity" or size <= levels[-1][0] else 0.0)
    return values, dx, {}


def fatnn(case, xs, gs, arrays):
    """`sum_i round(clip((x - sum_(j<i) 1/a_j) a_i, 0, 1))`; those below 0 count downwards.

    At its two corners the clip has half of the gradient.
    """
    values, dx = [], []
    learned = [[0.0] * len(row) for row in arrays["slopes"]]
    for x, g, group in zip(xs, gs, case.group, strict=True):
        slope, value, derivative = arrays["slopes"][group], 0, 0.0
        for side, columns in ((-1, range(-case.low)), (1, range(-case.low, len(slope)))):
            for i in columns:
                passed = side * x - sum(1 / slope[j] for j in columns if j < i)
                ramp = passed * slope[i]
                value += side * nearest(ramp, 0, 1)
                share = 1.0 if 0 < ramp < 1 else 0.5 if ramp in (0, 1) else 0.0
                derivative += g * share * slope[i]
                if share:
                    learned[group][i] += g * side * share * passed
                    for j in columns:
                        if j < i:
                            learned[group][j] += g * side * share * slope[i] / slope[j] ** 2
        values.append(float(value))
        dx.append(derivative)
    return values, dx, {"slopes": learned}


def log2(case, xs, gs, arrays):
    values = []
    for x in xs:
        exponent = 0 if math.isinf(x) else round(math.log2(abs(x))) if x else -math.inf
        values.append(sign(x) * 2.0 ** min(max(exponent, 1 - case.spec.levels // 2), 0))
    return values, gs, {}


REFERENCES = {
    "dorefa": {"input": dorefa, "output": dorefa, "kernel": dorefa_kernel},
    "pact": dict.fromkeys(("input", "kernel", "output"), pact),
    "lsq": dict.fromkeys(("input", "kernel", "output"), lsq),
    "lsq+": dict.fromkeys(("input", "kernel", "output"), lsq_plus),
    "minmax": dict.fromkeys(("input", "kernel", "output"), minmax),
    "kbit": dict.fromkeys(("input", "kernel", "output"), kbit),
    "quantized_tanh": dict.fromkeys(("input", "kernel", "output"), kbit),
    "quantized_relu": dict.fromkeys(("input", "output"), quantized_relu),
    "sign": dict.fromkeys(("input", "kernel", "output"), signs),
    "xnor": {"input": xnor_input, "kernel": xnor_kernel},
    "xnor++": {"input": signs, "kernel": xnor_plus_kernel},
    "bireal": {"input": signs, "kernel": bireal_kernel},
    "twn": {"kernel": twn},
    "ttq": {"kernel": ttq},
    "binarize": dict.fromkeys(("input", "kernel", "output"), binarize),
    "ternarize": dict.fromkeys(("input", "kernel", "output"), ternarize),
    "lq": dict.fromkeys(("input", "kernel", "output"), lq),
    "fatnn": dict.fromkeys(("input", "kernel", "output"), fatnn),
    "log2": dict.fromkeys(("input", "kernel"), log2),
}


def factored(case, xs, gs, arrays):
    """The method's, times its factor."""
    method = REFERENCES[case.method][case.site]
    if not case.spec.post_scale:
        return method(case, xs, gs, arrays)
    factors = case.each(arrays["post_scale"])
    inner = [g * each for g, each in zip(gs, factors, strict=True)]
    values, dx, learned = method(case, xs, inner, arrays)
    products = [g * value for g, value in zip(gs, values, strict=True)]
    learned = learned | {"post_scale": case.total(products)}
    return [value * each for value, each in zip(values, factors, strict=True)], dx, learned


def by_sample(case, xs, gs, arrays):
    """`Q(x / m) m`, m being mean |x| or sqrt(mean x^2) of a sample, with m's gradient."""
    samples = [position[0] for position in case.positions]
    members = {n: [i for i, own in enumerate(samples) if own == n] for n in samples}

    def total(values):
        return [math.fsum(values[i] for i in members[n]) for n in samples]

    number = len(members[0])
    if case.spec.normalise == "mean":
        sizes = [each / number for each in total(list(map(abs, xs)))]
        slopes = [(x > 0) - (x < 0) for x in xs]
    else:
        sizes = [math.sqrt(each / number) for each in total([x * x for x in xs])]
        slopes = [x / (size or 1.0) for x, size in zip(xs, sizes, strict=True)]
    sizes = [size or 1.0 for size in sizes]  # of zeros, whose factor is a constant
    normal = [x / size for x, size in zip(xs, sizes, strict=True)]
    inner = [g * size for g, size in zip(gs, sizes, strict=True)]
    values, dx, learned = factored(case, normal, inner, arrays)
    behind = total([g * value for g, value in zip(gs, values, strict=True)])
    before = total([d * n for d, n in zip(dx, normal, strict=True)])
    dx = [
        d / m + slope / number * (b - a / m)
        for d, m, slope, b, a in zip(dx, sizes, slopes, behind, before, strict=True)
    ]
    return [value * size for value, size in zip(values, sizes, strict=True)], dx, learned


def reference(case, xs, gs, arrays):
    """The method's, behind its normalisation and before its factor."""
    normalise = case.spec.normalise
    if normalise in ("mean", "variance"):
        return by_sample(case, xs, gs, arrays)
    normal = xs
    if normalise != "none":
        means = case.each(case.mean(xs))
        squares = [(x - mean) ** 2 for x, mean in zip(xs, means, strict=True)]
        deviations = case.each([math.sqrt(each) or 1.0 for each in case.mean(squares)])
        normal = [(x - mean) / std for x, mean, std in zip(xs, means, deviations, strict=True)]
    inner = gs
    if normalise == "restored":
        inner = [g * std for g, std in zip(gs, deviations, strict=True)]
    values, dx, learned = factored(case, normal, inner, arrays)
    if normalise == "none":
        return values, dx, learned
    # d std / d x = normal / N, d mean / d x = 1 / N; the normalised value depends on both.
    along = case.each(case.mean([d * n for d, n in zip(dx, normal, strict=True)]))
    mean_dx = case.each(case.mean(dx))
    after = [
        (d - mean - n * a) / std
        for d, mean, n, a, std in zip(dx, mean_dx, normal, along, deviations, strict=True)
    ]
    if normalise == "restored":
        of_std = case.each(case.mean([g * value for g, value in zip(gs, values, strict=True)]))
        of_mean = case.each(case.mean(gs))
        after = [d + s * n + m for d, s, n, m in zip(after, of_std, normal, of_mean, strict=True)]
        values = [
            value * std + mean for value, std, mean in zip(values, deviations, means, strict=True)
        ]
    return values, after, learned


def arrays_of(case):
    """Arrays of the quantizer, with exact steps that differ from group to group."""
    found = quantizers.start(case.spec, jnp.ones(case.shape, jnp.float64))
    steps = [0.25 * 2.0 ** (group % 3) for group in range(case.groups)]
    figures = {
        "step": [step * 1.25 for step in steps] if case.spec.power_of_two else steps,
        "offset": [0.375 * (group - 1) for group in range(case.groups)],
        "alpha": [step * case.high for step in steps],
        "gamma": [1.5 - 0.5 * channel for channel in range(case.shape[-1])],
        "positive": [0.75 + 0.5 * group for group in range(case.groups)],
        "negative": [0.5 + 0.25 * group for group in range(case.groups)],
        "post_scale": [1.0 - 0.75 * group for group in range(case.groups)],
        "lo": [-step * 1.5 for step in steps],
        "hi": [step * (case.spec.levels - 1) / 2 for step in steps],
        "slopes": [
            [2.0 ** ((group + i) % 3) for i in range(case.high - case.low)]
            for group in range(case.groups)
        ],
        "basis": [
            [0.25 * (1.25 if i == 1 else 1) * 2**i * (1 + group) for i in range(case.spec.bits)]
            for group in range(case.groups)
        ],
    }
    figures["log_step"] = [math.log2(step) for step in figures["step"]]
    if not case.spec.signed:
        figures["hi"] = [step * (case.spec.levels - 1) for step in steps]
        if case.spec.zero_point:
            figures["hi"] = [hi - 1.5 * step for hi, step in zip(figures["hi"], steps, strict=True)]
    learned, observed = (
        {name: figures[name] for name in names} for names in (found.learned, found.observed)
    )
    for name, array in (found.learned | found.observed).items():
        assert np.shape(array) == np.shape(figures[name]), name
    return learned, observed


def values_of(case, kind, seed=0):
    """Half steps and thresholds, saturated values, zeros and random ones, in random places."""
    number = len(case.positions)
    if kind in ("zeros", "equal"):
        return [0.0 if kind == "zeros" else 0.625] * number
    generator = np.random.default_rng(seed)
    widths = [0.125, 0.25, 0.5]  # halves of the steps above
    edges = [
        float(generator.choice(widths) * generator.integers(2 * case.low - 3, 2 * case.high + 4))
        for _ in range(number // 2)
    ]
    corners = [0.0, 0.0, 0.5, -0.5, 1.0, -1.0, 0.375, -(2.0**9), 2.0**9]
    if case.method == "ttq":  # the threshold itself
        corners[4:6] = [0.05 * 2.0**9, -0.05 * 2.0**9]
    if kind == "infinite":
        corners[-2:] = [-math.inf, math.inf]
    found = [*corners, *edges]
    found += generator.normal(size=number - len(found)).tolist()
    generator.shuffle(found)
    return found


def check(case, kind):
    xs = values_of(case, kind)
    gs = np.random.default_rng(1).normal(size=len(xs)).tolist()
    learned, observed = arrays_of(case)
    expected = reference(case, xs, gs, learned | observed)

    def quantize(x, learned):
        found = quantizers.Arrays(learned, jax.tree.map(jnp.asarray, observed, is_leaf=_list))
        return quantizers.quantize(case.spec, x, found)

    x = jnp.asarray(xs).reshape(case.shape)
    arrays = jax.tree.map(jnp.asarray, learned, is_leaf=_list)
    value, back = jax.vjp(quantize, x, arrays)
    dx, found = back(jnp.asarray(gs).reshape(case.shape))
    assert found.keys() == expected[2].keys()
    _close(value, expected[0], "value")
    _close(dx, expected[1], "gradient of x")
    for name in found:
        _close(found[name], expected[2][name], f"gradient of {name}")
    parts = quantizers.rounded(
        case.spec, x, quantizers.Arrays(arrays, jax.tree.map(jnp.asarray, observed, is_leaf=_list))
    )
    if parts.codes is not None:
        np.testing.assert_array_equal(parts.codes * parts.scale, value)
        np.testing.assert_array_equal(parts.codes, np.round(parts.codes))


def _list(node):
    return isinstance(node, list)


def _close(found, expected, what):
    expected = np.reshape(expected, found.shape)
    assert np.all(np.isfinite(expected)), what
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=what)


def cases():
    places = ("kernel", "input", "output")
    groupings = [dict(per=per) for per in ("layer", "channel", "groups:2", "size:2")]
    inwards = [dict(per="channel", axis="in"), dict(per="groups:2", axis="in")]
    for levels, site in itertools.product((2, 3, 4, 16, 256), places):
        yield Case(site, "lsq", levels=levels)
        if levels > 2:
            for method in ("pact", "minmax", "lsq+"):
                yield Case(site, method, levels=levels)
        if site != "output":
            # A clip with exact steps, as alpha and the steps above have.
            own = {} if site == "kernel" else {"clip": 0.25 * (levels - 1)}
            yield Case(site, "dorefa", levels=levels, **own)
    for levels, method in itertools.product((5, 7, 255), ("lsq", "lsq+", "pact", "minmax")):
        yield Case("kernel", method, levels=levels)
        yield Case("input", method, levels=levels)
    for levels in (5, 7, 255):
        yield Case("kernel", "dorefa", levels=levels)
        yield Case("input", "dorefa", levels=levels, clip=0.25 * (levels - 1))
        yield Case("input", "quantized_relu", levels=levels)
    yield Case("input", "lsq", levels=255, signed=True)
    yield Case("input", "minmax", levels=255, zero_point=True)
    for levels in (4, 16, 256):
        yield Case("kernel", "kbit", levels=levels)
        yield Case("input", "quantized_tanh", levels=levels)
    for levels in (2, 4, 16, 256):
        yield Case("input", "quantized_relu", levels=levels)
    for levels in (2, 4, 16):
        for site in places:
            yield Case(site, "lq", levels=levels)
    for levels, site in itertools.product((3, 4), places):
        yield Case(site, "fatnn", levels=levels)
    for levels, site in itertools.product((4, 16, 64), ("kernel", "input")):
        yield Case(site, "log2", levels=levels)
    for method in ("lsq", "lsq+", "pact", "minmax"):
        for levels in (3, 4):
            yield Case("kernel", method, levels=levels, signed=False)
            yield Case("input", method, levels=levels, signed=True)
    yield Case("input", "lsq", levels=2, signed=True)
    yield Case("input", "lq", levels=4, signed=True)
    yield Case("input", "fatnn", levels=3, signed=True)
    yield Case("input", "fatnn", levels=4, signed=True)
    for method, fields in {
        **dict.fromkeys(("lsq", "pact", "minmax", "lsq+", "lq", "fatnn"), dict(levels=4)),
        **dict.fromkeys(("twn", "ttq", "xnor", "bireal"), {}),
    }.items():
        for grouping in groupings + inwards:
            yield Case("kernel", method, **fields, **grouping)
        if fields:
            for grouping in groupings[1:]:
                yield Case("input", method, **fields, **grouping)
    for levels, grouping in itertools.product((2, 16), groupings[1:] + inwards):
        yield Case("kernel", "dorefa", levels=levels, **grouping)
    for gradient in ("identity", "clipped", "scaled", "triangle", "swish"):
        for site, method in itertools.product(
            ("kernel", "input"), ("sign", "xnor", "xnor++", "bireal", "binarize")
        ):
            yield Case(site, method, gradient=gradient)
        yield Case("kernel", "lsq", levels=2, gradient=gradient)
    for gradient in ("identity", "clipped", "scaled"):
        for site, method in itertools.product(("kernel", "input"), ("lsq", "lsq+", "minmax")):
            yield Case(site, method, levels=4, gradient=gradient, per="channel")
        yield Case("kernel", "kbit", levels=4, gradient=gradient)
        yield Case("output", "quantized_tanh", levels=4, gradient=gradient)
        yield Case("output", "quantized_relu", levels=4, gradient=gradient)
        yield Case("output", "ternarize", gradient=gradient)
    for gradient, site in itertools.product(("identity", "clipped"), ("kernel", "input")):
        yield Case(site, "lq", levels=4, gradient=gradient)
    for factor, site in itertools.product(quantizers.spec.STEP_GRADIENTS, ("kernel", "input")):
        yield Case(site, "lsq", levels=4, step_gradient=factor)
        yield Case(site, "lsq+", levels=4, step_gradient=factor, per="groups:2")
    for site in ("kernel", "input"):
        for method in ("lsq", "lsq+"):
            yield Case(site, method, levels=4, log_step=True, per="channel")
        for log_step in (False, True):
            yield Case(site, "lsq", levels=4, power_of_two=True, log_step=log_step, per="channel")
        yield Case(site, "minmax", levels=4, power_of_two=True, per="channel")
    for fields in (dict(), dict(power_of_two=True), dict(gradient="clipped")):
        yield Case("input", "minmax", levels=16, zero_point=True, per="channel", **fields)
    yield Case(
        "kernel", "minmax", levels=16, signed=False, zero_point=True, axis="in", per="size:2"
    )
    for k in ("channel", "spatial", "box"):
        yield Case("input", "xnor", k=k)
    for normalise, post_scale in (("standard", False), ("restored", False), ("restored", True)):
        for method, fields in dict(lsq=dict(levels=4, per="channel"), twn={}, xnor={}).items():
            yield Case("kernel", method, normalise=normalise, post_scale=post_scale, **fields)
    for normalise in ("mean", "variance"):
        for method in ("lsq", "lsq+", "minmax", "lq", "dorefa"):
            yield Case("input", method, levels=4, normalise=normalise)
        yield Case("input", "sign", normalise=normalise, gradient="clipped")
        yield Case("input", "xnor", normalise=normalise, k="channel")
        yield Case("input", "lsq", levels=4, normalise=normalise, post_scale=True, per="channel")
    yield Case("kernel", "sign", post_scale=True, per="groups:2", axis="in")
    yield Case("kernel", "xnor++", post_scale=True, axis="in")
    yield Case("input", "minmax", levels=4, post_scale=True, per="channel")
    yield Case("output", "ternarize", post_scale=True, per="size:2")


@pytest.mark.parametrize("case", list(cases()), ids=repr)
def test_edges_and_random_values(case, x64):
    check(case, "edges")


def defaults():
    for method, places in REFERENCES.items():
        for site in places:
            given = quantizers.METHODS[method][site].default
            yield Case(site, method, **({} if given else {"levels": 4}))


@pytest.mark.parametrize("kind", ["zeros", "equal"])
@pytest.mark.parametrize("case", list(defaults()), ids=repr)
def test_values_that_are_all_alike(case, kind, x64):
    check(case, kind)


# The others take means, least or largest values of what they round, which infinities make useless.
FINITE_RANGE = [
    case
    for case in defaults()
    if not (case.site == "kernel" and case.method in ("dorefa", "xnor", "bireal", "twn", "ttq"))
]


@pytest.mark.parametrize("case", FINITE_RANGE, ids=repr)
def test_infinities_saturate(case, x64):
    check(case, "infinite")


@pytest.mark.parametrize("method", ["lsq", "twn", "sign", "xnor"])
@pytest.mark.parametrize("normalise", ["standard", "restored", "mean", "variance"])
@pytest.mark.parametrize("kind", ["zeros", "equal"])
def test_normalised_values_that_are_all_alike(method, normalise, kind, x64):
    method = "minmax" if (method, normalise) in (("twn", "mean"), ("twn", "variance")) else method
    fields = dict(levels=4) if method in ("lsq", "minmax") else {}
    site = "input" if normalise in ("mean", "variance") else "kernel"
    check(Case(site, method, normalise=normalise, **fields), kind)


def test_every_method_and_site_has_a_reference():
    found = {name: set(places) - {"gradient"} for name, places in quantizers.METHODS.items()}
    assert found == {name: set(places) for name, places in REFERENCES.items()}


@pytest.mark.parametrize("fields", [{}, dict(per="channel"), dict(momentum=0.25, per="size:2")])
@pytest.mark.parametrize("site", ["kernel", "input"])
def test_observed_ranges_are_moving_averages(site, fields, x64):
    case = Case(site, "minmax", levels=4, **fields)
    xs = [x + 3.0 if site == "input" else x for x in values_of(case, "edges")]  # 0 is in a range
    _, observed = arrays_of(case)
    moved = _observe(case, xs, observed)
    share = case.spec.option("momentum")
    for group in range(case.groups):
        values = [xs[i] for i in case.members(group)]
        for name, found in (("lo", min(0.0, *values)), ("hi", max(0.0, *values))):
            expected = (1 - share) * observed[name][group] + share * found
            assert math.isclose(moved[name][group], expected, rel_tol=TOLERANCE)


@pytest.mark.parametrize("levels", [2, 4, 8])
@pytest.mark.parametrize("site", ["kernel", "input"])
def test_observed_bases_are_least_squares(site, levels, x64):
    """`(B'B)^-1 B'x` for the bits B that x has, by elimination; 0.9 of the old basis stays.

    The tolerance is that of the code's ridge, 1e-6 of the diagonal.
    """
    case = Case(site, "lq", levels=levels)
    xs = np.random.default_rng(3).normal(size=len(case.positions)).tolist()
    _, observed = arrays_of(case)
    moved = _observe(case, xs, observed)
    for group in range(case.groups):
        basis = observed["basis"][group]
        found = [(xs[i], lq_nearest(lq_levels(case, basis), xs[i])[1]) for i in case.members(group)]
        rows = [
            [sum(bits[j] * bits[k] for _, bits in found) for k in range(len(basis))]
            + [sum(bits[j] * x for x, bits in found)]
            for j in range(len(basis))
        ]
        solved = _eliminate(rows)
        if solved is None:  # some bit is never set, or two always together
            continue
        for old, new, own in zip(basis, solved, moved["basis"][group], strict=True):
            assert math.isclose(own, 0.9 * old + 0.1 * new, rel_tol=1e-4, abs_tol=1e-4)


def _eliminate(rows):
    """The solution of a symmetric system `[A | b]`, None where A is singular."""
    rows = [list(row) for row in rows]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-9:
            return None
        for j in range(n):
            if j != i:
                factor = rows[j][i] / rows[i][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def _observe(case, xs, observed):
    arrays = quantizers.Arrays({}, jax.tree.map(jnp.asarray, observed, is_leaf=_list))
    moved = quantizers.observe(case.spec, jnp.asarray(xs).reshape(case.shape), arrays)
    return jax.tree.map(lambda array: array.tolist(), moved.observed)


def _start(case, xs):
    arrays = quantizers.start(case.spec, jnp.asarray(xs).reshape(case.shape))
    return {name: array.tolist() for name, array in (arrays.learned | arrays.observed).items()}


@pytest.mark.parametrize("per", ["layer", "groups:2"])
@pytest.mark.parametrize("site", ["kernel", "input"])
def test_starts(site, per, x64):
    def figures(method, levels, xs=None, **fields):
        case = Case(site, method, levels=levels, per=per, **fields)
        xs = xs or values_of(case, "edges")
        groups = [[xs[i] for i in case.members(group)] for group in range(case.groups)]
        return _start(case, xs), groups, case

    def close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE)

    for levels in (2, 4, 256):
        found, groups, case = figures("lsq", levels)
        sizes = [sum(map(abs, group)) / len(group) for group in groups]
        close(found["step"], [2 * size / math.sqrt(case.high) for size in sizes])
    found, groups, _ = figures("pact", 4, alpha=6.0)
    close(found["alpha"], [6.0] * len(groups))
    for signed in (False, True):
        found, groups, _ = figures("pact", 4, signed=signed)
        groups = [[abs(x) if signed else x for x in group] for group in groups]
        close(found["alpha"], [max(group) for group in groups])
        found, groups, _ = figures("pact", 4, [-10.0] * math.prod(SHAPES[site]), signed=signed)
        close(found["alpha"], [10.0 if signed else 1.0] * len(groups))  # 1: of no values
    found, groups, _ = figures("minmax", 4)
    close(found["lo"], [min(group) for group in groups])
    close(found["hi"], [max(group) for group in groups])
    found, groups, case = figures("lq", 4)
    for basis, group in zip(found["basis"], groups, strict=True):
        # Powers of two times a base.
        assert math.isclose(basis[1], 2 * basis[0], rel_tol=TOLERANCE)
        deviation = math.sqrt(sum(x * x for x in group) / len(group))
        base = 0.6745 * deviation / 2 if site == "kernel" else 0.6745 * 2 * math.sqrt(2) / 3
        base *= 1 if site == "kernel" else deviation
        assert math.isclose(basis[0], base, rel_tol=TOLERANCE)
    if site == "kernel":
        found, groups, _ = figures("lsq+", 16)
        for step, group in zip(found["step"], groups, strict=True):
            mean = sum(group) / len(group)
            three = 3 * math.sqrt(sum((x - mean) ** 2 for x in group) / len(group))
            most = max(abs(mean - three), abs(mean + three))
            assert math.isclose(step, most / 2**3, rel_tol=TOLERANCE)
        found, groups, _ = figures("ttq", 3)
        for i, group in enumerate(groups):
            threshold = 0.05 * max(map(abs, group))
            for name, side in (("positive", 1), ("negative", -1)):
                kept = [side * x for x in group if side * x > threshold]
                assert math.isclose(found[name][i], sum(kept) / len(kept), rel_tol=TOLERANCE)
    else:
        found, groups, case = figures("lsq+", 16)
        for step, offset, group in zip(found["step"], found["offset"], groups, strict=True):
            whole = (max(group) - min(group)) / case.high  # all of the range, the last candidate
            errors = [
                sum((nearest((x - shift) / s, 0, case.high) * s + shift - x) ** 2 for x in group)
                for s, shift in ((step, offset), (whole, min(group)))
            ]
            assert errors[0] <= errors[1] * (1 + TOLERANCE)


def test_noise_of_rounded_gradients(x64):
    """DoReFa, equation 12, for the noise that the key gives."""
    case = Case("gradient", "dorefa", levels=4)
    xs, gs = values_of(case, "edges"), values_of(case, "edges", seed=5)
    arrays = quantizers.start(case.spec, jnp.ones(case.shape))
    arrays = quantizers.observe(case.spec, jnp.ones(case.shape), arrays)
    assert arrays.observed["calls"] == 1
    key = jax.random.fold_in(jax.random.wrap_key_data(arrays.observed["seed"]), 1)
    noise = jax.random.uniform(key, case.shape, jnp.float64, -0.5, 0.5).reshape(-1).tolist()
    x = jnp.asarray(xs).reshape(case.shape)
    value, back = jax.vjp(lambda x: quantizers.quantize(case.spec, x, arrays), x)
    np.testing.assert_array_equal(value, x)
    (found,) = back(jnp.asarray(gs).reshape(case.shape))
    expected, steps, samples = [], case.spec.levels - 1, case.shape[0]
    for i, (g, n) in enumerate(zip(gs, noise, strict=True)):
        sample = i * samples // len(gs)
        mine = gs[sample * len(gs) // samples : (sample + 1) * len(gs) // samples]
        most = max(map(abs, mine))
        whole = min(max(g / (2 * most) + 0.5 + n / steps, 0), 1)
        expected.append(2 * most * (round(whole * steps) / steps - 0.5))
    _close(found, expected, "rounded gradient")


def test_factors_of_the_output(x64):
    """XNOR-Net's K: the mean of |x| over channels and window; XNOR-Net++: products of factors."""
    case = Case("input", "xnor", k="box")
    xs = values_of(case, "edges")
    x = jnp.asarray(xs).reshape(case.shape)
    empty = quantizers.Arrays({}, {})
    convolution = linear_maps.ConvMap((1,), ((1, 1),), (1,), kernel_size=(3,))
    found = quantizers.output_scale(case.spec, x, empty, convolution)
    samples, width, channels = case.shape
    for n, i in itertools.product(range(samples), range(width)):
        window = [
            abs(xs[(n * width + j) * channels + c]) if 0 <= j < width else 0.0
            for j in (i - 1, i, i + 1)
            for c in range(channels)
        ]
        expected = math.fsum(window) / len(window)
        assert math.isclose(found[n, i, 0], expected, rel_tol=TOLERANCE)
    assert quantizers.output_scale(Case("input", "xnor").spec, x, empty, convolution) is None
    # Of normalised values, as the factor multiplies the codes.
    normal = Case("input", "xnor", k="box", normalise="mean")
    sizes = np.mean(np.abs(x), axis=(1, 2), keepdims=True)
    divided = quantizers.output_scale(normal.spec, x, empty, convolution)
    np.testing.assert_allclose(divided * sizes, found, rtol=TOLERANCE)

    generator = np.random.default_rng(2)
    kernel = jnp.ones(SHAPES["kernel"])
    for number, axes in ((1, None), (2, "ijc"), (3, "ij"), (4, "i,j")):
        fields = dict(method="xnor++", case=number, size=() if number == 1 else (2, 3))
        spec = quantizers.make("kernel", fields)
        learned = quantizers.start(spec, kernel).learned
        learned = {name: jnp.asarray(generator.normal(size=a.shape)) for name, a in learned.items()}
        arrays = quantizers.Arrays(learned, {})
        value = quantizers.quantize(spec, kernel, arrays)
        found = quantizers.output_scale(spec, x, arrays, convolution)
        if axes is None:
            assert found is None
            continue
        found = np.broadcast_to(found, (1, 2, 3, 4))
        for i, j, c in itertools.product(range(2), range(3), range(4)):
            if axes == "ijc":
                expected = learned["positions"][i, j, c]
            elif axes == "ij":
                expected = learned["positions"][i, j, 0] * learned["gamma"][c]
            else:
                expected = learned["axis0"][i, 0, 0] * learned["axis1"][0, j, 0]
                expected *= learned["gamma"][c]
            # gamma is the kernel's own factor: together they are the paper's.
            assert math.isclose(found[0, i, j, c] * value[0, 0, c], expected, rel_tol=TOLERANCE)


# With learned arrays, and those whose straight-through gradient is that of x itself.
LOSSES = dict(lsq=4, ttq=3, dorefa=2, twn=3, lq=4, log2=8, minmax=4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("method", LOSSES)
def test_loss(method, norm, x64):
    """x is pulled to its level, and learned arrays by the quantizer's gradient to x."""
    case = Case("kernel", method, levels=LOSSES[method], loss=0.5, loss_norm=norm)
    xs, power = values_of(case, "edges"), int(norm[1])
    learned, observed = arrays_of(case)
    values, _, _ = reference(case, xs, [1.0] * len(xs), learned | observed)
    errors = [x - value for x, value in zip(xs, values, strict=True)]
    signs_of = [(error > 0) - (error < 0) for error in errors]
    slopes_of = [
        0.5 * power * abs(error) ** (power - 1) * one / len(xs)
        for error, one in zip(errors, signs_of, strict=True)
    ]
    learned_slopes = reference(case, xs, [-one for one in slopes_of], learned | observed)[2]
    x = jnp.asarray(xs).reshape(case.shape)
    learned, observed = jax.tree.map(jnp.asarray, (learned, observed), is_leaf=_list)

    def loss(x, learned):
        return quantizers.loss(case.spec, x, quantizers.Arrays(learned, observed))

    found, (dx, dlearned) = jax.value_and_grad(loss, (0, 1))(x, learned)
    expected = 0.5 * sum(abs(error) ** power for error in errors) / len(errors)
    assert math.isclose(found, expected, rel_tol=TOLERANCE)
    _close(dx, slopes_of, "gradient of x")
    assert dlearned.keys() == learned_slopes.keys()
    for name, one in dlearned.items():
        _close(one, learned_slopes[name], f"gradient of {name}")


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_values_that_pass_have_no_loss(norm):
    spec = quantizers.make(
        "kernel", dict(method="lsq", bits=2, loss=1.0, loss_norm=norm, float_epochs=1.0)
    )
    x = jnp.asarray([[0.1, -0.7, 0.4, 1.3]])
    arrays = quantizers.start(spec, x)
    found = jax.value_and_grad(lambda x: quantizers.loss(spec, x, arrays))(x)
    for array in found:
        assert not np.any(array)


@pytest.mark.parametrize("method", ["lsq", "pact", "minmax", "lsq+", "dorefa"])
def test_stages_are_quantizers_of_their_levels(method, x64):
    """Each stage is as the quantizer of that many levels; before and behind, nothing is rounded."""
    fields = dict(stages=((0, 16), (2, 8), (5, 4)), float_epochs=1.0, stop_epoch=7.5)
    staged = Case("input", method, levels=4, **fields)
    xs = values_of(staged, "edges")
    x = jnp.asarray(xs).reshape(staged.shape)
    expected = ((0, None), (1, 16), (2, 8), (4.5, 8), (5, 4), (7, 4), (7.5, None), (9, None))
    for epoch, levels in expected:
        case = Case("input", method, levels=levels or 4)
        learned, observed = jax.tree.map(jnp.asarray, arrays_of(case), is_leaf=_list)
        arrays = quantizers.Arrays(learned, observed | quantizers.phase(staged.spec, epoch))
        found = quantizers.quantize(staged.spec, x, arrays)
        expected = quantizers.quantize(case.spec, x, quantizers.Arrays(learned, observed))
        np.testing.assert_array_equal(found, x if levels is None else expected)


@pytest.mark.parametrize("site", ["input", "kernel"])
@pytest.mark.parametrize("begin", [0, 1, 2.5, 4])
def test_rounding_begins_with_a_step_of_its_levels(begin, site, x64):
    """`2 mean |x| / sqrt(high)` for those of that epoch, whatever stages have passed before."""
    stages = ((0, 16), (2, 8), (4, 4))
    spec = Case(site, "lsq", levels=4, stages=stages, float_epochs=begin).spec
    plain = Case(site, "lsq", levels=4)
    xs = values_of(plain, "edges")
    mean = sum(map(abs, xs)) / len(xs)
    highs = {n: (n - 1) // 2 if site == "kernel" else n - 1 for _, n in stages}
    first = [n for epoch, n in stages if epoch <= begin][-1]
    for epochs in ((0.0, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0), (0.0, 5.0)):  # and a run that skips some
        arrays = quantizers.start(spec, jnp.asarray(xs).reshape(plain.shape))
        for epoch in epochs:
            arrays = quantizers.advance(spec, arrays, epoch)
            present = [n for start, n in stages if start <= epoch][-1]
            if epoch >= begin:
                step = 2 * mean / math.sqrt(highs[first]) * highs[first] / highs[present]
                np.testing.assert_allclose(arrays.learned["step"], [step], rtol=TOLERANCE)
    # The range of least error is one of these levels, too.
    x = jnp.asarray(xs).reshape(plain.shape)
    of_levels = quantizers.make(site, dict(method="lsq", levels=first))
    found = quantizers.calibrate(spec, x, "mse").learned["step"]
    np.testing.assert_array_equal(found, quantizers.calibrate(of_levels, x, "mse").learned["step"])


@pytest.mark.parametrize("field", ["freeze_epoch", "stop_epoch"])
def test_frozen_arrays_stay_where_they_are(field, x64):
    for method in ("lsq", "minmax", "lq"):
        case = Case("input", method, levels=4, **{field: 2.0})
        x = jnp.asarray(values_of(case, "edges")).reshape(case.shape)
        base = jax.tree.map(jnp.asarray, arrays_of(Case("input", method, levels=4)), is_leaf=_list)
        for epoch, moves in ((1, True), (2, False), (3, False)):
            arrays = quantizers.Arrays(base[0], base[1] | quantizers.phase(case.spec, epoch))
            moved = quantizers.observe(case.spec, x, arrays).observed
            for name in base[1]:
                assert (moved[name] != base[1][name]).any() == moves
            gradient = jax.grad(
                lambda learned, arrays=arrays, case=case, x=x: jnp.sum(
                    quantizers.quantize(case.spec, x, arrays._replace(learned=learned)) * x
                )
            )(base[0])
            for array in gradient.values():
                assert array.any() == moves

"""What wiNAS chooses from: pairs of an algorithm and a precision, as `config.winas.candidates`."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, layers, paths
from efficient_nets.errors import UserError
from efficient_nets.layers import LayerSpec, rules

# Those of arXiv 2002.10711, section 5.
BITS = (0, 16, 8)
ALGORITHMS = ("direct", "winograd:2,flex", "winograd:4,flex", "winograd:6,flex")
FIELDS = ("algorithm", "precision")
REFERENCE = {"algorithm": "direct", "precision": "float"}  # whose cost is 1

Candidate = Mapping[str, str]


def grid(
    algorithms: Sequence[str] = ALGORITHMS,
    bits: Sequence[int] = BITS,
    method: str = "minmax",
) -> tuple[dict[str, str], ...]:
    """Every algorithm at every number of bits, as `config.winas.candidates`.

    Args:
      algorithms: Short forms of `ops.winograd`.
      bits: Of kernel, input, output and, under Winograd's algorithm, of what is in its transforms
        and of these; 0 is float.
      method: Of the quantizers. All are signed: a net's first layers read values of both signs.
    """
    return tuple(
        {"algorithm": algorithm, "precision": _precision(algorithm, number, method)}
        for algorithm in algorithms
        for number in bits
    )


def _precision(algorithm: str, bits: int, method: str) -> str:
    if not bits:
        return "float"
    inner = "" if algorithm == "direct" else f"i{bits}t{bits}"
    return f"{method}:w{bits}a{bits}so{bits}s{inner}"


def label(candidate: Candidate) -> str:
    """Its name in tables, the same for two forms of one candidate: 'winograd:4,flex float'."""
    spec = LayerSpec(**candidate)
    return f"{spec.algorithm} {spec.precision}"


def of_config(config: ConfigDict) -> list[dict[str, str]]:
    """`config.winas.candidates`, checked.

    Raises:
      UserError: on fewer than two, two alike, another field, or a member that does not exist.
    """
    given = config.winas.candidates
    found = []
    for index, candidate in enumerate(given):
        field = f"winas.candidates[{index}]"
        if not isinstance(candidate, Mapping | ConfigDict) or set(candidate) != set(FIELDS):
            raise UserError(f"{field}={candidate!r}: give {' and '.join(FIELDS)}, both short forms")
        candidate = {name: candidate[name] for name in FIELDS}
        for name, value in candidate.items():
            if not isinstance(value, str):
                raise UserError(f"{field}.{name}={value!r}: give a short form, as 'winograd:4'")
        try:
            LayerSpec(**candidate)
        except UserError as error:
            raise UserError(f"{field}: {error}") from error
        if label(candidate) in map(label, found):
            raise UserError(f"{field}: {label(candidate)!r} is given twice")
        found.append(candidate)
    if len(found) < 2:
        raise UserError(
            f"winas.candidates has {len(found)}: it takes two or more; "
            "search.candidates.grid() gives those of the paper"
        )
    return found


def searched(config: ConfigDict) -> list[str]:
    """Paths of the convolutions that `config.winas.layers` matches, in the order of the calls.

    Those that Winograd's algorithm is none for are left out: of one tap, also in each phase of a
    stride, and dilated ones.

    Raises:
      UserError: if there are none.
    """
    info = data.describe(config.data)
    model = experiment.abstract_model(config, info)
    geometries = {path: layer.geometry for path, layer in layers.layers(model)}
    able = [
        cost.name
        for cost in analysis.layer_costs(model, info.image_shape)
        if cost.name in geometries and _has_tiles(geometries[cost.name])
    ]
    return paths.matching("winas.layers", config.winas.layers, able, "convolutions of several taps")


def with_chosen(config: ConfigDict, chosen: Mapping[str, Candidate]) -> ConfigDict:
    """The config in which each of these layers is its candidate, all others what they were."""
    info = data.describe(config.data)
    every = [path for path, _ in layers.layers(experiment.abstract_model(config, info))]
    config = config.copy_and_resolve_references()
    config.layers = rules.with_fields(config.layers, chosen, every)
    return config


def _has_tiles(geometry) -> bool:
    """Whether there are several taps along an axis, without gaps between them."""
    pairs = zip(geometry.kernel_size, geometry.strides, strict=True)
    return set(geometry.dilation) == {1} and any(size > stride for size, stride in pairs)

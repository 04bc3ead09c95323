"""The four axes of a layer, as one frozen spec.

    y = neuron( algorithm( precision(x), precision(kernel) ) )

Each axis is a table of named members. A new member is an entry in its table (and, for neurons, in
`ops.quadratic.NEURONS`); `README.md` shows how.
"""

import dataclasses

from efficient_nets import names
from efficient_nets.ops import quadratic

NORMS = {"none": "no norm before the product", "branch": "a batch norm on each branch"}
BACKWARDS = {
    "hybrid": "symbolic, keeps x and per-channel statistics only; reverse mode only",
    "autodiff": "keeps every intermediate; forward mode and higher derivatives too",
}
KERNELS = {"dense": "one array a branch"}
ALGORITHMS = {"direct": "lax convolution or matrix product"}
PRECISIONS = {"float": "nothing is rounded"}

AXES = {
    "neuron": quadratic.NEURONS,
    "norm": NORMS,
    "backward": BACKWARDS,
    "kernel": KERNELS,
    "algorithm": ALGORITHMS,
    "precision": PRECISIONS,
}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What a Dense or Conv is, axis by axis.

    Attributes:
      neuron: How the branches combine, a name in `ops.quadratic.NEURONS`.
      norm: 'branch' puts a batch norm on every branch of the neuron, 'none' does not.
      backward: 'hybrid' or 'autodiff'. A linear neuron without branch norm has nothing to save, so
        it is differentiated by JAX under either name.
      kernel: How weights are stored.
      algorithm: How the linear map is computed.
      precision: What is rounded, and where.

    Raises:
      UserError: on an unknown member, naming axis, value and what is allowed.
    """

    neuron: str = "linear"
    norm: str = "none"
    backward: str = "hybrid"
    kernel: str = "dense"
    algorithm: str = "direct"
    precision: str = "float"

    def __post_init__(self):
        for axis, table in AXES.items():
            names.pick(axis, getattr(self, axis), table)

    @property
    def storage(self) -> tuple[str, ...]:
        """The axes that decide which parameters there are; the others read the same ones."""
        return self.neuron, self.norm, self.kernel

    @property
    def branches(self) -> tuple[str, ...]:
        return quadratic.NEURONS[self.neuron].branches

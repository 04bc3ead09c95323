"""The four axes of a layer, as one frozen spec.

    y = neuron( algorithm( precision(x), precision(kernel) ) )

Each axis is a table of named members. A new member is an entry in its table, for neurons in
`ops.neurons.NEURONS`, for quantizers in `ops.quantizers.METHODS`; `README.md` shows how.
"""

import dataclasses
from collections.abc import Mapping

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops import factorization, neurons, precision, winograd
from efficient_nets.ops.factorization import Factorization
from efficient_nets.ops.precision import Precision
from efficient_nets.ops.winograd import Winograd

NORMS = {"none": "no norm before the product", "branch": "a batch norm on each branch"}
KERNEL_NORMS = {
    "none": "kernels as they are held",
    "spectral": "each branch's kernel divided by its largest singular value, see `layers.spectral`",
}
BACKWARDS = {
    "hybrid": "symbolic, keeps x and per-channel statistics only; reverse mode only",
    "autodiff": "keeps every intermediate; forward mode and higher derivatives too",
}
STARTS = {
    "own": "every branch from the layer's kernel_init and bias_init",
    "variance": "keeps a second moment of 1 through a layer without norm and activation, and over "
    "depth if the neuron has a linear term: a product squares every deviation from 1",
    "variance:relu": "the same through a layer followed by ReLU",
    "relinear": "as the linear layer it is converted from, or as one with fresh weights: the other "
    "terms are exactly 0 (ReLinear)",
    "kept": "with the kernels, biases and norms that the layer has: kernels are decomposed where "
    "the new ones are factorized, reconstructed where they are not; a new layer has its own",
}
AXES = {
    "norm": NORMS,
    "kernel_norm": KERNEL_NORMS,
    "backward": BACKWARDS,
    "start": STARTS,
}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What a Dense or Conv is, axis by axis.

    Attributes:
      neuron: How the branches combine: a name in `ops.neurons.NEURONS`, or 't1:R' or 'cqnn:R' for
        forms of rank R.
      norm: 'branch' puts a batch norm on every branch of the neuron, 'none' does not.
      kernel_norm: 'spectral' divides each branch's kernel by its largest singular value; 'none'.
      backward: 'hybrid' or 'autodiff'. A linear neuron without branch norm has nothing to save, so
        it is differentiated by JAX under either name.
      kernel: How weights are stored: 'dense', a short form such as 'tt:8', or a mapping with the
        fields of `ops.factorization.Factorization`, which both become.
      algorithm: How the linear map is computed: 'direct', a short form such as 'winograd:4,flex',
        or a mapping with the fields of `ops.winograd.Winograd`, which both become.
      precision: What is rounded, and where: a short form such as 'lsq:w4a4', a mapping of sites, or
        a `Precision`, which it becomes; see `ops.precision`.
      start: How parameters start, a name in `STARTS`. 'variance' is for layers without branch norm,
        whose second moments are those of `ops.neurons`.
      joint: Name of the layers that share the cores of a factorized kernel, see `layers.join`; none
        shares those of a dense one.

    Raises:
      UserError: on an unknown member, naming axis, value and what is allowed, and on members that
        do not go together.
    """

    neuron: str = "linear"
    norm: str = "none"
    kernel_norm: str = "none"
    backward: str = "hybrid"
    kernel: Factorization | str | Mapping = factorization.DENSE
    algorithm: Winograd | str | Mapping = winograd.DIRECT
    precision: Precision | str | Mapping = precision.FLOAT
    start: str = "own"
    joint: str = ""

    def __post_init__(self):
        for axis, table in AXES.items():
            names.pick(axis, getattr(self, axis), table)
        object.__setattr__(self, "precision", precision.parse(self.precision))
        object.__setattr__(self, "algorithm", winograd.parse(self.algorithm))
        object.__setattr__(self, "kernel", factorization.parse(self.kernel))
        self._check_algorithm()
        self._check_kernel()
        parts = self.parts
        if self.start == "relinear" and not parts.relinear:
            able = [name for name, other in neurons.NEURONS.items() if other.relinear]
            raise UserError(
                f"start='relinear': neuron={self.neuron!r} cannot start linear; these can: "
                + ", ".join(able)
            )
        if self.start.startswith("variance"):
            if parts.moments is None:
                raise UserError(f"start={self.start!r}: neuron={self.neuron!r} gives no `moments`")
            if self.norm != "none":
                raise UserError(
                    f"start={self.start!r} with norm={self.norm!r}: the norm undoes every scale"
                )

        if self.kernel_norm == "spectral":
            self._check_spectral()

    def _check_spectral(self) -> None:
        if self.start == "relinear":
            raise UserError(
                "kernel_norm='spectral' with start='relinear': that starts kernels at 0, which no "
                "factor brings to a norm of 1, and the first step would bring to all of it"
            )
        if self.joint:
            raise UserError(
                f"kernel_norm='spectral' with joint={self.joint!r}: each layer's kernel has a norm "
                "of its own, by which cores that layers share cannot be divided for use"
            )
        if self.precision.core is not None:
            raise UserError(
                "kernel_norm='spectral' with precision.core: what is divided is the kernel that "
                "the cores make; round that, precision.kernel"
            )

    def _check_algorithm(self) -> None:
        if self.algorithm == winograd.DIRECT:
            for site in self.precision.inner:
                raise UserError(
                    f"precision.{site}: algorithm='direct' has no transforms; give one such as "
                    "'winograd:4'"
                )
        elif "form" in self.parts.reads:
            raise UserError(
                f"algorithm='{self.algorithm}' with neuron={self.neuron!r}: its branches are forms "
                "of a window, not linear maps; give a rank, as in 't1:4', or algorithm='direct'"
            )

    def _check_kernel(self) -> None:
        if not isinstance(self.joint, str):
            raise UserError(f"joint={self.joint!r}: give a name, which the layers share")
        if self.kernel == factorization.DENSE:
            if self.precision.core is not None:
                raise UserError(
                    "precision.core with kernel='dense', which has no cores: give a kernel such as "
                    "'tt:8', or round the kernel itself, precision.kernel"
                )
            object.__setattr__(self, "joint", "")
            return
        if self.joint and self.start == "relinear":
            raise UserError(
                f"joint={self.joint!r} with start='relinear': a branch that starts at 0 would take "
                "cores that it shares with none; convert first, and join with start='kept'"
            )
        if self.joint and (self.kernel.dropout or self.kernel.lasso):
            raise UserError(
                f"joint={self.joint!r} with kernel='{self.kernel}': cores that layers share have "
                "neither dropout nor lasso; leave these out"
            )
        for site in ("kernel", *self.precision.inner):
            if self.kernel.dropout and site in self.precision.quantizers:
                raise UserError(
                    f"kernel='{self.kernel}' with precision.{site}: dropout scales the kernel, of "
                    "which a range is observed or learned; leave it out, or round the cores"
                )
        if self.joint and self.precision.core is not None:
            raise UserError(
                f"joint={self.joint!r} with precision.core: cores that layers share are not "
                "rounded; round the kernel that they make, precision.kernel"
            )
        if "form" in self.parts.reads:
            raise UserError(
                f"kernel='{self.kernel}' with neuron={self.neuron!r}: its branches are forms of a "
                "window, not linear maps; give a rank, as in 't1:4', or kernel='dense'"
            )
        if self.kernel.of_kernel and self.start != "kept":
            raise UserError(
                f"kernel='{self.kernel}' takes its rank from the kernel that it decomposes: give "
                "start='kept', or a rank"
            )
        if self.kernel.run == "factorized":
            for site in ("kernel", *self.precision.inner):
                if site in self.precision.quantizers:
                    raise UserError(
                        f"kernel='{self.kernel}' with precision.{site}: what is rounded there is "
                        "the whole kernel; leave out run=factorized"
                    )
            if self.algorithm != winograd.DIRECT:
                raise UserError(
                    f"kernel='{self.kernel}' with algorithm='{self.algorithm}': that transforms "
                    "the whole kernel; leave out run=factorized"
                )

    def with_kernel(self, kernel: Factorization | str) -> "LayerSpec":
        """The same with another kernel; a dense one has no cores to round."""
        kept = self.precision
        if kernel == factorization.DENSE:
            kept = dataclasses.replace(kept, core=None)
        return dataclasses.replace(self, kernel=kernel, precision=kept)

    @property
    def parts(self) -> neurons.Neuron:
        return neurons.neuron(self.neuron)

    @property
    def storage(self) -> tuple:
        """The axes that decide which parameters the branches have; the others read the same."""
        return self.neuron, self.norm, self.kernel_norm, self.kernel, self.joint

    @property
    def branches(self) -> tuple[str, ...]:
        return self.parts.branches

"""The kernel axis: one array, or cores whose contraction is the kernel.

Short forms are 'dense', or a form, its rank and options, with commas between:

    tt:8                 bonds of 8
    tr:4x6x4             bonds one by one, in the order of the cores
    tucker:0.1           a tenth of the dense kernel's parameters; 'same' is 1.0
    cp:evbmf             what variational Bayes finds in the kernel that is decomposed
    tt:energy=0.9        what keeps nine tenths of its squares; of cp, tr, bt at most that
    tt:8,order=2         modes of inputs and of features; in=7x8x14,out=8x4x4 gives them
    tt:8,layout=axes     which modes share a core, see `forms.LAYOUTS`
    bt:0.1,blocks=4      blocks of a block-term form
    tt:8,run=factorized  how it is computed, see `RUNS`
    tt:8,always          also where it has more parameters than the dense kernel
    tt:8,dropout=0.1     tensor dropout: in training a tenth of each bond's indices is left out
    tt:8,lasso=0.01      in training the loss has this factor times the lasso of the bonds' indices

The long form is a mapping with the fields of `Factorization`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops.factorization import forms, modes, ranks
from efficient_nets.ops.factorization.network import Network

DENSE = "dense"
RUNS = {
    "auto": "whichever takes fewer operations and bytes",
    "factorized": "the input goes from core to core; for no convolution with groups",
    "reconstructed": "the cores make the kernel, which is used as a dense one",
}
OF_KERNEL = {
    "evbmf": "empirical variational Bayes on unfoldings of the kernel",
    "energy": "the share `energy` of the kernel's squares, of cp, tr and bt at most that",
}


@dataclasses.dataclass(frozen=True)
class Factorization:
    """A kernel as a network of cores.

    Attributes:
      form: A key of `forms.FORMS`.
      rank: Size of every bond, or a tuple of one each, or the share of the dense kernel's
        parameters (a float), or a key of `OF_KERNEL`, for kernels that are decomposed.
      energy: Of rank='energy'.
      blocks: Of 'bt'.
      layout: A key of `forms.LAYOUTS`, the form's own if empty.
      order: Modes of inputs and of features, the form's own number if 0.
      in_modes, out_modes: Their sizes, whose products are at least in and features; chosen by
        `modes.balanced` if empty.
      run: A key of `RUNS`.
      always: Whether a kernel is factorized that has fewer parameters dense; else it stays dense.
      dropout: Probability with which an index of a bond is left out of a training step, see
        `regularization.dropped`; in evaluation all are there.
      lasso: Factor of `regularization.rank_lasso` in the loss of training.
    """

    form: str
    rank: int | float | str | tuple[int, ...]
    energy: float = 0.0
    blocks: int = 0
    layout: str = ""
    order: int = 0
    in_modes: tuple[int, ...] = ()
    out_modes: tuple[int, ...] = ()
    run: str = "auto"
    always: bool = False
    dropout: float = 0.0
    lasso: float = 0.0

    def __post_init__(self):
        names.pick("kernel.form", self.form, forms.FORMS)
        for field in ("in_modes", "out_modes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        rank = self.rank
        if rank == "same":
            rank = 1.0
        if isinstance(rank, Sequence) and not isinstance(rank, str):
            rank = tuple(rank)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "layout", self.layout or forms.FORMS[self.form].layout)
        if self.form == "bt" and not self.blocks:
            object.__setattr__(self, "blocks", 2)
        self._check()

    def _check(self) -> None:
        rank = self.rank
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
        share = isinstance(rank, float) and 0 < rank < math.inf
        each = isinstance(rank, tuple) and rank and all(type(n) is int and n > 0 for n in rank)
        if not (whole or share or each or rank in OF_KERNEL):
            raise UserError(
                f"kernel.rank={rank!r}: allowed a whole number above 0, one for each bond in a "
                f"tuple, a share of the parameters such as 0.1, 'same', {', '.join(OF_KERNEL)}"
            )
        if (rank == "energy") != bool(self.energy) or not 0 <= self.energy <= 1:
            raise UserError(
                f"kernel.energy={self.energy!r} with rank={rank!r}: give rank='energy' a share "
                "above 0, up to 1, and others none"
            )
        if (self.form == "bt") != bool(self.blocks) or self.blocks < 0:
            raise UserError(f"kernel.blocks={self.blocks!r} with form={self.form!r}: 'bt' has them")
        names.pick("kernel.layout", self.layout, forms.LAYOUTS)
        names.pick("kernel.run", self.run, RUNS)
        if not isinstance(self.always, bool):
            raise UserError(f"kernel.always={self.always!r}: allowed True, False")
        for field, most, allowed in (
            ("dropout", 1, "a probability from 0 on, below 1"),
            ("lasso", math.inf, "a finite number from 0 on"),
        ):
            given = getattr(self, field)
            if type(given) not in (int, float) or not 0 <= given < most:
                raise UserError(f"kernel.{field}={given!r}: allowed {allowed}")
            object.__setattr__(self, field, float(given))
        if type(self.order) is not int or not 0 <= self.order <= 8:
            raise UserError(f"kernel.order={self.order!r}: allowed 0 (the form's own), 1 to 8")
        for field in ("in_modes", "out_modes"):
            given = getattr(self, field)
            if not all(type(n) is int and n > 0 for n in given):
                raise UserError(f"kernel.{field}={given!r}: give whole numbers above 0")
            if given and self.order and len(given) != self.order:
                raise UserError(f"kernel.{field}={given}: order={self.order} asks for as many")

    def __str__(self) -> str:
        """The short form."""
        rank = "x".join(map(str, self.rank)) if isinstance(self.rank, tuple) else str(self.rank)
        parts = [f"{self.form}:" + (f"energy={self.energy}" if rank == "energy" else rank)]
        if self.form == "bt":
            parts.append(f"blocks={self.blocks}")
        if self.layout != forms.FORMS[self.form].layout:
            parts.append(f"layout={self.layout}")
        parts += [f"order={self.order}"] if self.order else []
        for name, given in (("in", self.in_modes), ("out", self.out_modes)):
            parts += [f"{name}={'x'.join(map(str, given))}"] if given else []
        parts += [f"run={self.run}"] if self.run != "auto" else []
        parts += ["always"] if self.always else []
        for field in ("dropout", "lasso"):
            parts += [f"{field}={getattr(self, field)}"] if getattr(self, field) else []
        return ",".join(parts)

    @property
    def of_kernel(self) -> bool:
        """Whether its rank is known with the kernel alone."""
        return self.rank in OF_KERNEL

    def network(self, kernel_shape: Sequence[int], layers: int = 0) -> Network:
        """The cores of a kernel `(*kernel_size, in, features)`; their bonds are 1 if `of_kernel`.

        With `layers`, the cores of that many such kernels together, see `joint`.

        Raises:
          UserError: if the modes do not make up the kernel, or there are not as many ranks as
            bonds.
        """
        order = max(self.order, len(self.in_modes), len(self.out_modes))
        order = order or forms.FORMS[self.form].order
        sizes = []
        for field, size in (("in_modes", kernel_shape[-2]), ("out_modes", kernel_shape[-1])):
            own = getattr(self, field) or modes.balanced(size, order)
            if field == "out_modes" and not self.out_modes and self.layout == "paired":
                own = own[::-1]  # a large mode of inputs with a small one of features
            if math.prod(own) < size:
                raise UserError(f"kernel.{field}={own}: they make up less than {size} features")
            sizes.append(own)
        if self.layout == "paired" and len(sizes[0]) != len(sizes[1]):
            raise UserError(
                f"kernel.in_modes={sizes[0]}, out_modes={sizes[1]}: layout='paired' takes as many"
            )
        made = forms.network(self.form, self.layout, kernel_shape, *sizes, self.blocks, layers)
        if self.of_kernel:
            return made
        if isinstance(self.rank, float):
            proportional = forms.FORMS[self.form].proportional
            return ranks.of_share(made, self.rank, proportional=proportional)
        bonds = ranks.free_bonds(made)
        each = self.rank if isinstance(self.rank, tuple) else (self.rank,) * len(bonds)
        return ranks.of_numbers(made, each)


def parse(value: Any) -> Factorization | str:
    """'dense', or a `Factorization`, of a short or long form.

    Raises:
      UserError: on what is neither.
    """
    if isinstance(value, Factorization) or value == DENSE:
        return value
    if isinstance(value, Mapping):
        fields = [field.name for field in dataclasses.fields(Factorization)]
        names.check_fields("kernel", value, fields)
        for field in ("form", "rank"):
            if field not in value:
                raise UserError(f"kernel has no {field!r}: give it, as in dict(form='tt', rank=8)")
        return Factorization(**value)
    return Factorization(**_short_form(value))


def _short_form(text: Any) -> dict[str, Any]:
    form, colon, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
    names.pick("kernel", form, {DENSE: None} | dict.fromkeys(forms.FORMS))
    if form == DENSE or not rest:
        raise UserError(f"kernel={text!r}: give a rank behind a form, as in 'tt:8', or 'dense'")
    rank, *options = rest.split(",")
    found: dict[str, Any] = {"form": form} | _rank(text, rank)
    for option in options:
        key, equals, value = option.partition("=")
        if option == "always":
            new = {"always": True}
        elif key in ("in", "out") and value:
            new = {f"{key}_modes": _numbers(text, value)}
        elif key in ("order", "blocks") and value.isdecimal():
            new = {key: int(value)}
        elif key in ("layout", "run") and value:
            new = {key: value}
        elif key in ("dropout", "lasso") and value:
            new = {key: _number(text, key, value)}
        else:
            raise UserError(
                f"kernel={text!r}: {option!r} is not understood; allowed are order=, in=, out=, "
                "layout=, blocks=, run=, always, dropout=, lasso="
            )
        if new.keys() & found.keys():
            raise UserError(f"kernel={text!r}: {key!r} is given twice")
        found |= new
    return found


def _rank(text: str, rank: str) -> dict[str, Any]:
    key, equals, value = rank.partition("=")
    try:
        if key == "energy":
            return {"rank": key, "energy": float(value)}
        if rank in OF_KERNEL or rank == "same":
            return {"rank": rank}
        if "x" in rank:
            return {"rank": _numbers(text, rank)}
        return {"rank": int(rank) if rank.isdecimal() else float(rank)}
    except ValueError:
        raise UserError(
            f"kernel={text!r}: {rank!r} is no rank; give one such as 8, 4x6x4, 0.1, same, evbmf, "
            "energy=0.9"
        ) from None


def _number(text: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"kernel={text!r}: {key}={value!r} is no number") from None


def _numbers(text: str, value: str) -> tuple[int, ...]:
    parts = value.split("x")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"kernel={text!r}: {value!r} is no list of numbers such as 7x8x14")
    return tuple(map(int, parts))

"""The precision axis: what is rounded around a linear map, by which quantizer.

Short forms, in which a number is bits, or levels with an L behind it; an s behind that is signed,
as inputs are not unless they say so. Sites inside of a map with transforms are signed:

    'float'                           nothing is rounded
    'lsq:w4a4', 'lsq:w3La8'           one method; w: kernel, a: input, o: output, g: gradient
    'lsq:w8a8i8'                      the same inside of transforms; i: v (transformed input),
                                      u (transformed kernel) and h (their products' sums);
                                      t: the transforms, b: between their steps
    'lsq:w4a4s'                       the same for inputs on both sides of 0
    'xnor', 'twn'                     one method at each site that needs no number
    'lsq:c4a8'                        c: the cores of a factorized kernel
    'w=lq:2,a=pact:2'                 a method for each site
    'ternarize/clipped'               a method with another gradient than its first one, behind /

The long form is a mapping from the names of the sites, see `Precision`, to the fields of a
`quantizers.Quantizer`, such as `dict(kernel=dict(method='lsq', bits=4, per='channel'))`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops import quantizers
from efficient_nets.ops.quantizers import Quantizer
from efficient_nets.ops.quantizers.spec import INNER

NUMBER = r"\d+L?s?"
LETTERS = {
    "w": "kernel",
    "a": "input",
    "o": "output",
    "g": "gradient",
    "c": "core",
    "v": "transformed_input",
    "u": "transformed_kernel",
    "h": "hadamard",
    "t": "transforms",
    "b": "between",
}
INNER_LETTER = "i"  # for these together
TOGETHER = "vuh"


@dataclasses.dataclass(frozen=True)
class Precision:
    """What is rounded, by site; None where nothing is.

    Attributes:
      kernel: Each branch's kernel; of a factorized one what its cores make.
      input: What the layer reads.
      output: The neuron's value with its biases, before an outer norm.
      gradient: What the linear maps get back.
      core: Each core of each branch's factorized kernel, with a range of its own. A layer that
        stays dense, as cores gain nothing there, is without it.
      transforms: The matrices of a map with transforms, each with a range of its own.
      transformed_input, transformed_kernel: What is multiplied there.
      hadamard: The sums of these products over the channels.
      between: What one step of a transform hands to the next.
    """

    kernel: Quantizer | None = None
    input: Quantizer | None = None
    output: Quantizer | None = None
    gradient: Quantizer | None = None
    core: Quantizer | None = None
    transforms: Quantizer | None = None
    transformed_input: Quantizer | None = None
    transformed_kernel: Quantizer | None = None
    hadamard: Quantizer | None = None
    between: Quantizer | None = None

    def __str__(self) -> str:
        """A short form, which ends in '...' where it does not say all."""
        sites = {letter: getattr(self, site) for letter, site in LETTERS.items()}
        sites = {letter: quantizer for letter, quantizer in sites.items() if quantizer}
        if not sites:
            return "float"
        shown = {letter: _number_text(quantizer) for letter, quantizer in sites.items()}
        methods = {letter: _method_text(quantizer) for letter, quantizer in sites.items()}
        found = set(methods.values())
        alike = {(methods[x], shown[x]) for x in TOGETHER if x in sites}
        if len(alike) == 1 and sites.keys() >= set(TOGETHER):
            for table in (sites, shown, methods):
                table[INNER_LETTER] = table["v"]
            for letter in TOGETHER:
                del sites[letter], shown[letter]
        if len(found) == 1:
            text = found.pop() + ":" + "".join(map("".join, shown.items()))
        else:
            text = ",".join(f"{x}={methods[x]}:{shown[x]}" for x in sites)
        if "stored" in {quantizer.method for quantizer in sites.values()}:
            return text  # of a net for use: no config can ask for it
        return text if parse(text) == self else f"{text}..."

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Those that there are, by site."""
        sites = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {site: quantizer for site, quantizer in sites.items() if quantizer is not None}

    @property
    def inner(self) -> tuple[str, ...]:
        """The sites inside of a map with transforms that are rounded."""
        return tuple(site for site in self.quantizers if site in INNER)


FLOAT = Precision()


def parse(value: Any) -> Precision:
    """A Precision of its short or long form, see above.

    Raises:
      UserError: on what is neither, an unknown name, or a combination that does not exist.
    """
    if isinstance(value, Precision):
        return value
    if isinstance(value, str):
        value = {} if value == "float" else _short_form(value)
    if not isinstance(value, Mapping):
        raise UserError(
            f"precision={value!r}: give 'float', a text such as 'lsq:w4a4', or a mapping of sites"
        )
    names.check_fields("precision", value, LETTERS.values())
    made = {}
    for site, fields in value.items():
        if isinstance(fields, Quantizer | None):
            if fields is not None and fields.site != site:
                raise UserError(f"precision.{site}: the quantizer is one for {fields.site!r}")
            made[site] = fields
            continue
        if not isinstance(fields, Mapping):
            raise UserError(f"precision.{site}={fields!r}: give a mapping with 'method'")
        made[site] = quantizers.make(site, fields)
    return Precision(**made)


def _short_form(text: str) -> dict[str, dict]:
    if "=" in text:
        return _by_site(text, [_site(text, part) for part in text.split(",")])
    method, colon, sites = text.partition(":")
    own = _method(method)
    table = names.pick("precision", own["method"], {"float": {}} | quantizers.METHODS)
    if not colon:
        able = [site for site, entry in table.items() if entry.default]
        if not able:
            raise UserError(f"precision={text!r}: give bits, as in '{method}:w4a4'")
        return {site: own for site in able if site != "output"}
    found = re.findall(rf"([a-z])({NUMBER})", sites)
    letters = {*LETTERS, INNER_LETTER}
    if not found or "".join(map("".join, found)) != sites or not set(dict(found)) <= letters:
        raise UserError(
            f"precision={text!r}: after the colon give letters of {', '.join(LETTERS)}, "
            f"{INNER_LETTER}, each with bits, or with levels and an L, and an s for signed, as in "
            "'w4a4', 'w3La8' or 'w4a4s'"
        )
    return _by_site(text, [(letter, own | _number(n)) for letter, n in found])


def _by_site(text: str, found: list[tuple[str, dict]]) -> dict[str, dict]:
    """Fields by letters as fields by sites."""
    spread = [
        (LETTERS[one], fields)
        for letter, fields in found
        for one in (TOGETHER if letter == INNER_LETTER else letter)
    ]
    if len(dict(spread)) < len(spread):
        raise UserError(f"precision={text!r}: a site is given twice")
    return dict(spread)


def _site(text: str, part: str) -> tuple[str, dict]:
    letter, _, rest = part.partition("=")
    method, _, number = rest.partition(":")
    if letter not in {*LETTERS, INNER_LETTER} or (number and not re.fullmatch(NUMBER, number)):
        raise UserError(
            f"precision={text!r}: {part!r} is not understood; a site is as in 'w=lq:2' or "
            f"'a=twn:3L', with {', '.join(LETTERS)} or {INNER_LETTER}"
        )
    return letter, _method(method) | (_number(number) if number else {})


def _method(text: str) -> dict[str, str]:
    method, slash, gradient = text.partition("/")
    return {"method": method} | ({"gradient": gradient} if slash else {})


def _number(text: str) -> dict[str, int | bool]:
    signed = {"signed": True} if text.endswith("s") else {}
    text = text.removesuffix("s")
    return ({"levels": int(text[:-1])} if text.endswith("L") else {"bits": int(text)}) | signed


def _method_text(quantizer: Quantizer) -> str:
    entry = quantizers.METHODS.get(quantizer.method, {}).get(quantizer.site)
    if entry is None or quantizer.gradient == entry.gradients[0]:
        return quantizer.method
    return f"{quantizer.method}/{quantizer.gradient}"


def _number_text(quantizer: Quantizer) -> str:
    levels, bits = quantizer.levels, quantizer.bits
    number = str(bits) if 2**bits == levels else f"{levels}L"
    signed = quantizer.site in INNER or quantizers.method(quantizer).signed
    return number + ("s" if quantizer.signed and not signed else "")

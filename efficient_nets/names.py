"""Errors for names that a person types: what was given, what is allowed, what may be meant."""

import difflib
import pathlib
from collections.abc import Iterable

from efficient_nets.errors import UserError


def nearest(name: object, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or an empty string where nothing is near."""
    found = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def pick(field: str, name: str, table: dict):
    """`table[name]`.

    Raises:
      UserError: if there is no such name; says the field, the value and what is allowed.
    """
    if not isinstance(name, str) or name not in table:
        allowed = ", ".join(sorted(table))
        raise UserError(f"{field}={name!r} is not known: allowed {allowed}{nearest(name, table)}")
    return table[name]


def local_folder(field: str, folder: str) -> pathlib.Path:
    """The folder as a path, which would make `gs:/x` of `gs://x`.

    Raises:
      UserError: on an address such as `gs://...`.
    """
    if "://" in folder:
        raise UserError(
            f"{field}={folder!r}: only folders of this machine, or mounted on it (as gcsfuse "
            "mounts a bucket), are allowed"
        )
    return pathlib.Path(folder)


def check_fields(field: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises a UserError if `given` holds a name that `allowed` lacks."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise UserError(
                f"{field} has no field {name!r}: allowed {', '.join(allowed)}"
                + nearest(name, allowed)
            )

"""Split strings, with the meaning TFDS gives them, for every kind of data set."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from efficient_nets.errors import UserError

Part = tuple[str, int, int]  # the examples start .. stop - 1 of a named split


def split_info(name: str, length: int) -> tfds.core.SplitInfo:
    """Describes a split that is not TFDS's own."""
    return tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)


def parse(field: str, spec: str, splits: Mapping[str, tfds.core.SplitInfo]) -> list[Part]:
    """The parts of `splits` that a string such as 'train[:90%]+test' selects.

    Raises:
      UserError: the string is malformed, names an unknown split, or selects nothing.
    """
    try:
        instructions = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits)
    except (ValueError, NotImplementedError) as error:
        sizes = {name: info.num_examples for name, info in splits.items()}
        raise UserError(
            f"data.{field}={spec!r} does not select from the splits {sizes}; "
            f"write for example 'train' or 'train[:90%]': {error}"
        ) from error
    parts = []
    for part in instructions:
        stop = splits[part.splitname].num_examples if part.to is None else part.to
        if stop > (start := part.from_ or 0):
            parts.append((part.splitname, start, stop))
    if not parts:
        raise UserError(f"data.{field}={spec!r} selects no image; '' means no such split")
    return parts


def take(values: Mapping[str, np.ndarray], parts: Sequence[Part]) -> np.ndarray:
    """The parts of an array per split, one after the other."""
    return np.concatenate([values[name][start:stop] for name, start, stop in parts])

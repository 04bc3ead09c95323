"""Downloads and prepares a TFDS data set once, in the format that training reads.

    python -m efficient_nets.data.prepare cifar10 [--dir DATA_DIR]

The only program of this package that needs TensorFlow: install the extra `prepare`.
"""

import argparse
import importlib.util

from efficient_nets.data import tfds_sets
from efficient_nets.errors import UserError


def prepare(name: str, data_dir: str = "") -> str:
    """Prepares the set as array_record, unless it is there, and returns the folder it is in.

    Raises:
      UserError: the name is unknown, or the set is there in a format without random access.
    """
    builder = tfds_sets.open_builder(name, data_dir)
    builder.download_and_prepare(file_format="array_record")
    if not tfds_sets.has_random_access(builder):
        raise UserError(
            f"{name} is already in {builder.data_path}, in a format that cannot be read at "
            "random; give another folder with --dir"
        )
    return str(builder.data_path)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a TFDS name, such as cifar10")
    parser.add_argument("--dir", default="", help="TFDS data_dir, where it is not the default")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("tensorflow") is None:
        parser.exit(1, "preparing needs TensorFlow: pip install '.[prepare]' in the repository\n")
    try:
        print(f"{args.name} is prepared in {prepare(args.name, args.dir)}")
    except UserError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()

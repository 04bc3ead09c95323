"""What a person can mend: main prints these as one line, without a traceback."""


class UserError(ValueError):
    """Bad input: a config field, a file, a data set, a workdir."""


class TrainingDiverged(ArithmeticError):
    """The loss, the gradient or the parameters are no longer finite."""


def mistake(error: BaseException) -> BaseException:
    """What a config file raised because of a person's mistake, out of what absl made of it.

    Any other error in the file's own code stays as it is: absl has put the traceback into it.
    """
    root = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__
    return root if isinstance(root, UserError) or "get_config() takes" in str(root) else error

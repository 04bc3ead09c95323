"""What a person can mend: main prints these as one line, without a traceback."""


class UserError(ValueError):
    """Bad input: a config field, a file, a data set, a workdir."""


class TrainingDiverged(ArithmeticError):
    """The loss or the gradient is no longer finite."""

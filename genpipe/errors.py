"""The one exception that means "the input is at fault": everything that a person can get wrong raises it."""


class InputError(ValueError):
    """Something given by the user cannot be used.

    Its message is one sentence that names the input, the limit it broke and what to do about it. The command line
    prints it after `error: ` and exits with code 2; any other exception is a fault of genpipe and keeps its traceback.
    """

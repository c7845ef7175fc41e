"""The one exception for what a user can mend."""


class UserError(ValueError):
    """A mistake in a config, a data set, a checkpoint or a reward function.

    The message is one line that names where it is (file, line, field) and how to mend it. The command line prints
    it without a traceback and exits with 2; every other exception is a bug of ours and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class CommonError(UserError):
    """One that all processes of a job have at the same place, so that they can still act together."""

"""The errors that a user can put right, each one clear sentence."""


class PaperworksError(Exception):
    """Something went wrong that one sentence explains; the command line prints it and exits.

    Example:
        >>> str(PaperworksError("the run failed")), PaperworksError.exit_status
        ('the run failed', 1)
    """

    exit_status = 1


class UsageError(PaperworksError, ValueError):
    """What was asked for cannot be done as asked: an unknown paper, option or place.

    Example:
        >>> isinstance(UsageError("no such paper"), ValueError), UsageError.exit_status
        (True, 2)
    """

    exit_status = 2

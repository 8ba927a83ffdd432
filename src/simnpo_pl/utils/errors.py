"""The one exception for mistakes a user can mend; the command line prints it as a single line."""


class UserError(ValueError):
    """Bad input: the message says what was expected, what was found and what to do, in one line."""

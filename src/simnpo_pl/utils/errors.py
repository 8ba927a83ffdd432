class UserError(ValueError):
    """Bad input that the user can fix: expected, found and what to do, in one line that the command line prints."""

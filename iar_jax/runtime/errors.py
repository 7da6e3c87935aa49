"""The one exception for mistakes that a person can put right."""


class UserError(Exception):
    """Shown to the user as it is, without a stack trace; the program ends with exit code 2.

    The message says what was wrong, where, what is allowed and what to do.
    """

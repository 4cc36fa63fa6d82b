"""How a command ends other than by success, in words that are meant for the user."""


class UserError(ValueError):
    """Its message says where, what was given, what was expected and the mend."""

    quiet = False
    """Whether another rank of this machine says it."""


class Stopped(Exception):
    """The run was asked to end before its last step, and has saved; the message says by what."""

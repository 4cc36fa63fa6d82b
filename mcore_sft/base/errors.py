"""The one kind of error that is meant for the user."""


class UserError(ValueError):
    """Its message says where, what was given, what was expected and the mend."""

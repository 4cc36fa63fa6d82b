"""Fusible operations, which only annotations name."""


class FusibleOperation:
    """No layer is one."""


class Sequential:
    """No layer is one."""

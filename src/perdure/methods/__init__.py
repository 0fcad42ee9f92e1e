"""Methods: one file each. A user's own registers with `@perdure.register_method("name")` from any file."""

from ._method import Method, MethodConfig, register

__all__ = ["Method", "MethodConfig", "register"]

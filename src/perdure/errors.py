"""Errors that a user can mend, each with the exit code the command line ends with.

Every message names the field, what was found and what to do about it.
"""

from __future__ import annotations

OK, BAD_INPUT, PROTOCOL_REFUSED, FORGOT_TOO_MUCH = 0, 64, 65, 66
NON_FINITE, CANNOT_WRITE, INTERRUPTED = 70, 73, 130


class PerdureError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class BadInput(PerdureError, ValueError):
    """Input, configuration or usage that cannot be honoured."""

    exit_code = BAD_INPUT


class ProtocolRefused(PerdureError):
    """A method needs, or a run did, something that the declared protocol does not grant."""

    exit_code = PROTOCOL_REFUSED


class ForgotTooMuch(PerdureError):
    """Forgetting went beyond the limit that the recipe sets."""

    exit_code = FORGOT_TOO_MUCH


class NonFiniteLoss(PerdureError):
    """The loss became NaN or infinite; the last good state is kept."""

    exit_code = NON_FINITE


class CannotWrite(PerdureError):
    """The output folder is full, locked by another run, or not writable."""

    exit_code = CANNOT_WRITE


class Interrupted(PerdureError):
    """The user pressed Ctrl-C; a checkpoint was written first."""

    exit_code = INTERRUPTED


class DamagedState(PerdureError):
    """A checkpoint fails its checksums or its schema."""

    exit_code = BAD_INPUT

"""The errors that a user can do something about."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in what the user asked for or gave. One sentence says it, so commands print it without a traceback."""


# Why a clip cannot be used.
CAUSES = ("missing", "empty", "unreadable", "truncated", "damaged", "not finite", "too short", "out of scale")


class AudioDecodingError(ValueError):
    """Why one clip cannot be used. `cause` is a short, countable kind, one of `CAUSES`."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):  # the default would pickle the message alone, and worker processes send these to the main process
        return type(self), (self.cause, str(self))


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Raise a library's complaint about what the user set again, as a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OSError, RecursionError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{what}: {error}") from error

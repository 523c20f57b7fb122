"""Errors that a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake of the user. Commands print its one sentence without a traceback."""


def missing_model(model: object) -> UserError:
    """The error of all commands about a model that is neither here nor on the Hub."""
    return UserError(
        f"there is no folder or file {model} here, and no model of this name that can be reached on the Hub: check the path; or the name "
        "(OWNER/NAME), the network, and for a private one the login (hf auth login)"
    )


class AudioDecodingError(ValueError):
    """Why a clip cannot be used; such clips are counted by `cause`: "missing", "empty", "unreadable", "truncated", "damaged", "not finite",
    "too short", "out of scale" or "changed"."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):  # worker processes pickle these errors, by default without `cause`
        return type(self), (self.cause, str(self))


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Raise a library's error about what the user set as a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RecursionError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error

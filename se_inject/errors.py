"""The errors that se_inject raises on purpose."""

from __future__ import annotations


class SEInjectError(Exception):
    """Base of every error raised by se_inject.

    The message says what was asked, what was found, and what to write instead.
    """

    def __init__(self, message: str) -> None:
        if not message.strip():
            raise ValueError("SEInjectError needs a message: what was asked, what was found, what to do")
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(SEInjectError, ValueError):
    """An option has a value that cannot be used, or is no option at all."""


class NoSitesError(SEInjectError, ValueError):
    """The model has no place left for a block, or the filters left none."""


class TraceError(SEInjectError, RuntimeError):
    """The model could not be run on its input size, or is of a kind that cannot be rewritten."""


class WeightsError(SEInjectError, ValueError):
    """A file or state dict does not fit the model, or cannot be read safely."""


class Refusal(Exception):
    """Why something cannot be done at one place: "not here, because".

    It never reaches a user. Whoever looks at the place turns it into the reason of a skipped site or of a kept block, or
    into an `SEInjectError` where there is nothing else to do.
    """

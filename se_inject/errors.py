"""The errors that se_inject raises on purpose."""

from __future__ import annotations


class SEInjectError(Exception):
    """Base class of all errors that se_inject raises.

    Args:
        message: What was asked, what was found, and what to write instead.

    Raises:
        ValueError: The message is empty.

    Example:
        >>> import se_inject
        >>> try:
        ...     se_inject.plan("resnet5")
        ... except se_inject.SEInjectError as error:
        ...     print(str(error).partition(";")[0])
        timm has no model 'resnet5'
    """

    def __init__(self, message: str) -> None:
        if not message.strip():
            raise ValueError("SEInjectError needs a message: what was asked, what was found, what to write instead")
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(SEInjectError, ValueError):
    """An option is unknown, or its value cannot be used."""


class NoSitesError(SEInjectError, ValueError):
    """The model has no place for a block, or the options leave none. The message counts the reasons.

    Args:
        message: What was asked, what was found, and what to write instead.

    Example:
        >>> import se_inject, timm
        >>> try:
        ...     se_inject.inject(timm.create_model("test_resnet"), stages=9)
        ... except se_inject.NoSitesError as error:
        ...     print(str(error).partition(" (")[0])
        test_resnet: all 4 sites are skipped
    """


class TraceError(SEInjectError, RuntimeError):
    """The model does not run on its input size, or belongs to a kind that cannot be rewritten."""


class WeightsError(SEInjectError, ValueError):
    """A file or a state dict does not fit the model, or cannot be read safely."""


class Refusal(Exception):
    """Internal: "not here, because". The message is the reason alone, such as ``its weight is shared``.

    A step raises it where an optimization, a rewrite or a rescaling is possible for some modules, but not for this one.
    It never reaches a user. The step that tries the place catches it: `find` and `inject` turn the message into
    `Site.reason`, reports turn it into the reason of a skipped place, and a function that has to answer for the whole
    model raises an `SEInjectError` with the message, the path of the module and what to write instead.
    """

"""Errors that a user can cause. The message is one sentence for the user and says what to do.

Programming errors (a tensor of the wrong shape, an impossible argument) are assertions.
"""


class LdvcError(Exception):
    """Base class of all errors that a user can cause."""


class InvalidImageError(LdvcError):
    """The picture cannot be read or used."""


class InvalidNamesError(LdvcError):
    """The class names cannot be used."""


class WeightsNotFoundError(LdvcError):
    """Weights are not on this machine and cannot be downloaded."""


class DataError(LdvcError):
    """A data set is missing, incomplete or in an unknown format."""


class CheckpointError(LdvcError):
    """A checkpoint or its configuration cannot be used."""

"""Errors that a user can cause. The message is one sentence that says what to do, fit to be shown on the page.

Mistakes of a programmer (a tensor of the wrong shape, an impossible argument) are assertions, not these.
"""


class LdvcError(Exception):
    """Parent of every error that a user can cause."""


class InvalidImageError(LdvcError):
    """The picture cannot be read or is of a kind that cannot be segmented."""


class InvalidNamesError(LdvcError):
    """The list of class names is empty or holds something that is not a name."""


class WeightsNotFoundError(LdvcError):
    """Weights are neither on this machine nor reachable."""


class DataError(LdvcError):
    """A data set is missing, incomplete or in an unknown format."""


class CheckpointError(LdvcError):
    """A checkpoint or its configuration does not fit the model."""

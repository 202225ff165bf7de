"""What can be wrong with the files of a data set."""

from __future__ import annotations


class DataError(ValueError):
    """A data set that is not there or not whole; the message says which file, and what to do."""

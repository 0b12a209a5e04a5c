"""The error tree: every mistake a user can make is a leaf that names the place and the cure.

Each leaf also inherits the standard-library type it replaces, so `except ValueError` keeps working, and stays
picklable, so that Ray hands the caller the same type that a worker raised.
"""

from __future__ import annotations


class RaylignError(Exception):
    """Root of all errors raised on purpose by raylign."""


class ConfigError(RaylignError, ValueError):
    """A configuration key is unknown, out of range, or without effect for the chosen method."""


class DataError(RaylignError, ValueError):
    """Preference data cannot be used as given."""


class RowError(DataError):
    """One row cannot be used; ingest turns it into a quarantine record.

    Args:
        reason: short stable code, for example "invalid_json" or "chosen_equals_rejected".
        detail: one sentence about this row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class QuarantineLimitError(DataError):
    """More rows were quarantined than `data.max_bad_fraction` allows."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data file or directory does not exist or holds no readable file."""


class ShapeError(RaylignError, ValueError):
    """Tensors passed to a pure function disagree in shape."""


class ModelError(RaylignError, ValueError):
    """A model directory cannot be used: missing tokenizer, chat template, weights, or unsupported architecture."""


class CacheMismatchError(RaylignError, RuntimeError):
    """A cached artefact was made from other inputs than the ones it is asked for."""


class OutputExistsError(RaylignError, FileExistsError):
    """The run directory is in use and neither resume nor another name was asked for."""


class ResourceError(RaylignError, RuntimeError):
    """The plan asks for more than the Ray cluster has, or a wait for resources timed out."""


class CheckpointError(RaylignError, RuntimeError):
    """A trainer checkpoint is incomplete or belongs to another run."""


class TrainingError(RaylignError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class MissingDependencyError(RaylignError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class SamplerError(TrainingError):
    """Sampling engines died or hung more often than `sampler.max_restarts` allows, or refuse the model."""


class StaleWeightsError(TrainingError):
    """An engine does not hold the weights that the trainer sent: wrong version, checksum, or probe log-probability."""


class SubmitError(RaylignError, RuntimeError):
    """A job cannot be submitted or followed: no job server, no or a wrong token, or more than the server takes."""

"""Every error this project raises on purpose.

    MoestroError                 something a person can fix
    ├── ConfigError              a setting is wrong (also a ValueError)
    ├── ShapeError               a tensor has the wrong shape or dtype (also a ValueError)
    ├── BackendError             a kernel was asked for by name and cannot run here
    ├── DataError                text that is missing, empty, undecodable or too short
    ├── CheckpointError          a checkpoint that is truncated, altered or does not match
    └── TrainingError            a run that cannot go on (NaN, full disk)

Each message says what was given, what is allowed and what to do. The command line prints the
message alone and exits with 2; `TrainingError` exits with 1, since the input was fine.
"""


class MoestroError(Exception):
    """Root of the tree: catch this to catch everything the project raises on purpose."""


class ConfigError(MoestroError, ValueError):
    """A setting has a value that is not allowed, or a name that does not exist."""


class ShapeError(MoestroError, ValueError):
    """A tensor does not have the shape or dtype that the public function requires."""


class BackendError(MoestroError, RuntimeError):
    """A kernel backend was named explicitly and cannot run on this machine."""


class DataError(MoestroError, ValueError):
    """Text is missing, empty, undecodable, or too short for one context."""


class CheckpointError(MoestroError):
    """A checkpoint is missing, truncated, altered, or does not match the settings."""


class TrainingError(MoestroError, RuntimeError):
    """A run cannot go on: a non-finite loss, or a checkpoint that cannot be written."""

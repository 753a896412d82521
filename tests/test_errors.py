import pytest

from moestro import errors

KINDS = (
    errors.ConfigError,
    errors.ShapeError,
    errors.BackendError,
    errors.DataError,
    errors.CheckpointError,
    errors.TrainingError,
)


@pytest.mark.parametrize("kind", KINDS)
def test_one_except_catches_every_error(kind):
    assert issubclass(kind, errors.MoestroError)
    assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.ShapeError, errors.DataError])
def test_bad_input_is_also_a_value_error(kind):
    assert issubclass(kind, ValueError)

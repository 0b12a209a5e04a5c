"""Every error is picklable, because Ray sends it across processes, and keeps the stdlib type it stands for."""

from __future__ import annotations

import pickle

import pytest

from raylign import errors


def _leaves(cls=errors.RaylignError):
    return {cls} | {leaf for child in cls.__subclasses__() for leaf in _leaves(child)}


@pytest.mark.parametrize("cls", sorted(_leaves(), key=lambda c: c.__name__))
def test_errors_survive_pickling(cls):
    error = errors.RowError("missing_field", "no prompt") if cls is errors.RowError else cls("what and cure")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize(
    ("cls", "stdlib"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataNotFoundError, FileNotFoundError),
        (errors.OutputExistsError, FileExistsError),
        (errors.MissingDependencyError, ImportError),
        (errors.ShapeError, ValueError),
        (errors.SubmitError, RuntimeError),
    ],
)
def test_errors_inherit_the_type_they_replace(cls, stdlib):
    assert issubclass(cls, stdlib)
    assert issubclass(cls, errors.RaylignError)

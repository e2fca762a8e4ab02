"""Shared by the tests of training runs."""

import pytest

from tests.training.helpers import Trainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """One for all files: a process takes seconds to start."""
    trainer = Trainer(tmp_path_factory.mktemp("data"))
    yield trainer
    trainer.close()

"""What every test starts from: the same random numbers, in Hypothesis and in the library."""

import pytest
from hypothesis import settings

import tinytensor as tt

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    tt.manual_seed(0)

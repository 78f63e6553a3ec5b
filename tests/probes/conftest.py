"""What tests of probes share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """All of them."""

"""How many cases a property is tried on: 150 by default, 5,000 in `make test-reliability`; and damage to files."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


class Cases(NamedTuple):
    """A number of cases; the same cases each time."""

    count: int

    def settings(self, check: Any) -> Any:
        """Apply the settings to a property."""
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
        return settings(
            max_examples=self.count, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
        )(check)


CASES = [
    pytest.param(Cases(150), id="quick"),
    pytest.param(Cases(5000), id="long", marks=pytest.mark.reliability),
]
DAMAGE = st.tuples(st.integers(0, 10**6), st.integers(0, 256))
"""Arguments of `damaged`."""


def damaged(content: bytes, at: int, value: int) -> bytes:
    """The content cut off or with another byte."""
    at %= max(1, len(content))
    return content[:at] if value == 256 else content[:at] + bytes([value]) + content[at + 1 :]

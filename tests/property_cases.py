"""How many cases a property is tried on: a few hundred by default, 5,000 in `make test-reliability`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings


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

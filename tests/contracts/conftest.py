"""Every contract is asked of every op."""

import pytest

from tests.contracts.ops import OPS, Op


@pytest.fixture(params=OPS, ids=str, scope="session")
def op(request: pytest.FixtureRequest) -> Op:
    """Each op in turn; a test's own parameters go before it."""
    chosen: Op = request.param
    return chosen

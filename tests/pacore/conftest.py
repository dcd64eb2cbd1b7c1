import asyncio

import pytest

from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.records import Problem


@pytest.fixture
def solve():
    """Solves one problem with a sampler; fields are the configuration's."""

    def solve(sampler, schedule=(4,), *, problem=None, matching="math", coordinate=None, **fields):
        config = PacoreConfig(schedule=tuple(schedule), **fields)
        asked = problem or Problem(id="p", messages=({"role": "user", "content": "What is 6 x 7?"},))
        options = coordinate or {}
        return asyncio.run(Coordinator(sampler, config, matching=matching).solve(asked, **options))

    return solve

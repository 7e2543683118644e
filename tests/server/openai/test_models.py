"""/v1/models by the official client."""

from __future__ import annotations

import asyncio

import openai
import pytest
from tests.server.openai.fakes import Served


def test_list_and_retrieve() -> None:
    async def run() -> None:
        served = Served()
        listed = (await served.client.models.list()).data
        assert [model.id for model in listed] == ["tiny/moe", "tiny"]
        assert listed[0].created == 7 and listed[0].owned_by == "moesaic"
        assert listed[1].model_dump()["max_model_len"] == 4096
        assert (await served.client.models.retrieve("tiny/moe")) == listed[0]
        with pytest.raises(openai.NotFoundError) as error:
            await served.client.models.retrieve("other/model")
        assert error.value.code == "model_not_found" and "tiny/moe" in error.value.message

    asyncio.run(run())

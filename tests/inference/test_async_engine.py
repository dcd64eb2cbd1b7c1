"""The engine behind asyncio: streams, cancellation, failures, an end in good order."""

import asyncio
import dataclasses
import threading

import jax
import pytest

from stepjax.config import MeshConfig
from stepjax.errors import BusyError, RequestError
from stepjax.inference.async_engine import AsyncEngine, EngineError, EngineFailedError
from stepjax.inference.config import EngineConfig
from stepjax.inference.replicas import AsyncReplicas, make_engines
from stepjax.inference.request import SamplingParams
from stepjax.sharding import make_mesh

PROMPT = [3, 1, 4, 1, 5]
PARAMS = SamplingParams(seed=1, max_tokens=12)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def settled(engine):
    """Figures once everything is free again."""
    for _ in range(1000):
        stats = engine.stats()
        if not (stats.running or stats.waiting or stats.pages_used):
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(stats)


def test_requests_side_by_side_give_what_the_engine_gives(make_engine):
    wishes = [dataclasses.replace(PARAMS, seed=i, n=1 + i % 3) for i in range(12)]
    expected = [[c.tokens for c in make_engine().generate([PROMPT], wish)[0]] for wish in wishes]

    async def main():
        async with AsyncEngine(make_engine()) as engine:
            return await asyncio.gather(*(engine.complete(PROMPT, wish) for wish in wishes))

    # `generate` counts the seed on from the first prompt's: that is the wish's own.
    assert [[c.tokens for c in completions] for completions in run(main())] == expected


def test_a_stream_that_is_closed_frees_its_pages(make_engine):
    async def main():
        async with AsyncEngine(make_engine(prefix_caching=False)) as engine:
            stream = engine.stream(PROMPT, dataclasses.replace(PARAMS, n=3, max_tokens=100))
            seen = [await anext(stream) for _ in range(4)]
            await stream.aclose()
            stats = await settled(engine)
            assert len(seen) == 4 and stats.cancelled_samples == 3
            # A task that is cancelled before the engine has heard of its request.
            task = asyncio.create_task(engine.complete(PROMPT, PARAMS))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(engine)
            assert len(await engine.complete(PROMPT, PARAMS)) == 1

    run(main())


def test_what_cannot_be_served_is_said_to_the_one_who_asked(make_engine):
    async def main():
        async with AsyncEngine(make_engine()) as engine:
            with pytest.raises(RequestError, match="no tokens"):
                await engine.complete([], PARAMS)
            assert len(await engine.complete(PROMPT, PARAMS)) == 1

    run(main())


def test_draining_finishes_what_is_under_way(make_engine):
    async def main():
        async with AsyncEngine(make_engine()) as engine:
            task = asyncio.create_task(engine.complete(PROMPT, PARAMS))
            await asyncio.sleep(0)
            await engine.drain()
            assert task.done() and len(task.result()[0].tokens) == 12
            assert not engine.healthy
            with pytest.raises(BusyError, match="shutting down"):
                await engine.complete(PROMPT, PARAMS)

    run(main())


def test_closing_ends_open_streams(make_engine):
    async def main():
        async with AsyncEngine(make_engine()) as engine:
            stream = engine.stream(PROMPT, dataclasses.replace(PARAMS, max_tokens=120))
            await anext(stream)
        with pytest.raises(EngineError, match="stopped"):
            async for _ in stream:
                pass

    run(main())


def test_a_failure_reaches_all_who_wait(make_engine, monkeypatch):
    engine = make_engine()
    steps = iter(range(3))

    def fail_later():
        if next(steps, None) is None:
            raise MemoryError("the device is out of memory")
        return step()

    step = engine.step
    monkeypatch.setattr(engine, "step", fail_later)

    async def main():
        async with AsyncEngine(engine) as served:
            both = await asyncio.gather(*(served.complete(PROMPT, PARAMS) for _ in range(2)), return_exceptions=True)
            assert all(isinstance(error, EngineFailedError) and "out of memory" in str(error) for error in both)
            assert not served.healthy
            with pytest.raises(EngineFailedError, match="out of memory"):
                await served.complete(PROMPT, PARAMS)

    run(main())


def test_a_sample_that_fails_is_the_failure_of_its_request_alone(make_engine):
    """As if no bound had been put on the field where it enters."""
    wrong = dataclasses.replace(PARAMS)
    object.__setattr__(wrong, "top_k", 2**31)
    ((expected,),) = make_engine().generate([PROMPT], PARAMS)

    async def main():
        async with AsyncEngine(make_engine()) as engine:
            failed, (other,) = await asyncio.gather(
                engine.complete(PROMPT, wrong), engine.complete(PROMPT, PARAMS), return_exceptions=True
            )
            assert type(failed) is EngineError and "2147483648" in str(failed)
            assert engine.healthy and other.tokens == expected.tokens
            await settled(engine)

    run(main())


def test_a_call_that_is_cancelled_before_it_is_made_harms_nobody(make_engine):
    async def main():
        async with AsyncEngine(make_engine()) as engine:
            go_on, made = threading.Event(), []
            busy = asyncio.create_task(engine.call(lambda e: go_on.wait(10)))
            task = asyncio.create_task(engine.call(made.append))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            assert await busy and not made
            assert engine.healthy and len(await engine.complete(PROMPT, PARAMS)) == 1

    run(main())


def test_weights_change_between_steps(make_engine, small_model):
    async def main():
        async with AsyncEngine(make_engine()) as engine:
            task = asyncio.create_task(engine.complete(PROMPT, PARAMS))
            await engine.call(lambda e: e.update_weights(small_model))
            (completion,) = await task
            return completion.tokens

    ((expected,),) = make_engine().generate([PROMPT], PARAMS)
    assert run(main()) == expected.tokens


def test_engines_along_the_data_axis_share_the_requests(small_model, make_words, make_engine):
    """Two engines of two devices each: the requests go to both, and say what one device says."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    config = EngineConfig(max_sequences=2, page_size=16, prefill_tokens=32, feature_cache_tokens=64)
    engines = make_engines(small_model, make_words(), config, mesh)
    assert [set(e.model.decoder.norm.scale[...].devices()) for e in engines] == [
        set(jax.devices()[:2]),
        set(jax.devices()[2:4]),
    ]
    wishes = [dataclasses.replace(PARAMS, seed=i) for i in range(4)]

    async def main():
        async with AsyncReplicas(engines) as replicas:
            completions = await asyncio.gather(*(replicas.complete(PROMPT, wish) for wish in wishes))
            assert replicas.healthy and replicas.stats().finished_samples == 4
            await replicas.call(lambda engine: engine.update_weights(small_model))
            await replicas.drain()
            with pytest.raises(BusyError):
                await replicas.complete(PROMPT, PARAMS)
            return [c.tokens for (c,) in completions]

    expected = [c.tokens for (c,) in make_engine().generate([PROMPT] * 4, wishes)]
    assert run(main()) == expected
    assert [engine.stats().finished_samples for engine in engines] == [2, 2]

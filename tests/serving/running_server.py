"""Servers on a port of their own, in a thread of their own."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time

import httpx
from fake_engine import FakeEngine
from PIL import Image

from stepjax.serving.app import make_app
from stepjax.serving.server import DrainingServer, bind
from stepjax.serving.settings import PACORE, ServerSettings


class Running:
    """A server, its engine and a client."""

    def __init__(self, server, loop, thread, engine, app):
        self.server, self.loop, self.thread, self.engine = server, loop, thread, engine
        self.context = app.state.context
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def chat(self, content="hi", **fields):
        return self.http.post("/v1/chat/completions", json=chat_body(content, **fields))

    def wait_until(self, condition, seconds=10.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not happen"
            time.sleep(0.005)


@contextlib.contextmanager
def serving_process(make_arguments, **options):
    """A process that begins to serve, and a client of it. Killed at the end, if it is still there.

    Args:
        make_arguments: of Python, from the port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        subprocess.Popen([sys.executable, *make_arguments(port)], **options) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client,
    ):
        try:
            yield process, client
        finally:
            process.kill()


def wait_for(client, process=None, seconds=60):
    """Until a server of another process listens."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.ConnectError):
            return client.get("/health")
        assert time.monotonic() < end and (process is None or process.poll() is None), "the server does not start"
        time.sleep(0.05)


def chat_body(content="hi", **fields):
    return {"messages": [{"role": "user", "content": content}], **fields}


@contextlib.contextmanager
def running(processor, engine=None, *, pacore=PACORE, codec=None, **settings):
    """Serves until the block ends."""

    async def make(stack):
        made = engine or FakeEngine()
        if hasattr(made, "__aenter__"):
            made = await stack.enter_async_context(made)
        return made, make_app(made, processor, ServerSettings(**{"model_name": "tiny", **settings}), pacore, codec)

    with running_app(make) as one:
        yield one


@contextlib.contextmanager
def running_app(make):
    """Serves what `make` gives, called in the server's loop: an engine, or None, and an app."""
    ready, state = threading.Event(), {}

    async def main():
        async with contextlib.AsyncExitStack() as stack:
            made, app = await make(stack)
            server = DrainingServer(app)
            state.update(server=server, loop=asyncio.get_running_loop(), engine=made, app=app)
            serving = asyncio.create_task(server.serve([bind("127.0.0.1", 0)]))
            while not server.started:
                await asyncio.sleep(0.005)
            ready.set()
            await serving

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(60), "the server does not start"
    one = Running(thread=thread, **state)
    try:
        yield one
    finally:
        one.server.should_exit = True
        one.http.close()
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def picture(width=60, height=40, color="teal", form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


async def ask(client, index, max_tokens):
    body = chat_body(f"question {index}", stream=index % 2 == 0, max_tokens=max_tokens)
    if body["stream"]:
        text, lines = "", []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line:
                    lines.append(line.removeprefix("data: "))
        if response.status_code != 200:
            return response.status_code, lines
        assert lines[-1] == "[DONE]", lines[-1]
        for line in lines[:-1]:
            text += json.loads(line)["choices"][0]["delta"].get("content", "")
        return 200, text
    response = await client.post("/v1/chat/completions", json=body)
    return response.status_code, response.json()["choices"][0]["message"]["content"]


async def ask_many(server, count, max_tokens=50):
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
        return await asyncio.gather(*(ask(client, index, max_tokens) for index in range(count)))

"""Latency of an answer over a slow network: coded features against features as int8 and against image files.

    sudo python benchmarks/tofc_network.py [RUN ...] [--base RUN] [--codec avif:30] [--codec jpeg:20@0.5]
        [--rates 25 50 100] [--questions 15] [--delay-ms 10]

The runs are by default those of `benchmarks/tofc.py`.

A device and servers run in two network namespaces of this machine. A RUN has a codec (`stepjax tofc train`); its server
gets the features of its device as a coded stream, and as int8. The server of --base has none and gets image files: the
codec and its quality, and after @ a scale by which the device shrinks the image first.

    device (core 0) -- veth, tbf at 25, 50, 100 KB/s (1000 bytes) -- proxy -- stepjax serve (core 1)

tbf throttles what the device sends, not the answers. It lets 1600 bytes pass at once, the least for packets of 1514: a
datagram uses these up before every request, so that every byte of it waits for the link. The proxy delays both
directions by --delay-ms, and the first request of a connection by twice that for the handshake. It stands at the
server, whose API takes image files only in base64, a third larger, and enlarges no image. So that neither counts
against image files, they are sent as they are: the proxy writes the base64, and enlarges a shrunk image to its size
(sent on as BMP). "Data URI" is the latency with the base64 on the link, computed from its bytes.

The questions are the first held-out ones of the first evaluation source of the first RUN. All ways get the same ones,
and every rate and mode others: nothing is asked twice, and caches do not help. Rates, modes and ways take turns. All
servers are up at once, but one is asked at a time. There are three modes:

    first token       of the answer or its reasoning, over a connection that stays open between questions
    whole answer      the same to its end
    new connection    to the first token, with a connection for each question

A latency is from the image in memory to the reply's text:

    encode     shrinking, encoder, merging and coder on the device; of image files shrinking and the file's codec
    send       until the proxy hands the request to the server
    answer     until the server has answered; with the base64 and the enlarging of image files
    total      also with the reply's way back

It needs root, and `ip` and `tc` of iproute2. Run one at a time: it first ends what an earlier run has left.

Writes results/tofc_network.json.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parent.parent
SERVER_SIDE, DEVICE_SIDE = "stepjax-server", "stepjax-device"  # namespaces
SERVER_ADDRESS, DEVICE_ADDRESS = "10.77.0.1", "10.77.0.2"
LINK = "veth"  # the interface's name at both ends
SERVER_PORT, PROXY_PORT = 8000, 9000  # of the first server; the others' follow
BURST, QUEUE = 1600, 8_000_000  # bytes that tbf lets pass at once, and that wait in it
FILLER = 1472  # bytes of the datagram that uses the burst up; 1514 with its headers
REFILL = 0.1  # seconds before a question; the slowest rate that fills the burst in this time is 16 KB/s
WARM_UPS = 2  # questions of each way that are not measured
START_SECONDS = 600  # for a server to load and compile
FORMATS = {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF", "jxl": "JXL"}
FILE = "image_file"  # the proxy's type of a part whose file stands after the line of JSON
MODES = {"first token": (1, True), "whole answer": (None, True), "new connection": (1, False)}  # tokens; stays open
ENGINE = dict(max_sequences=1, max_prefix_groups=1)  # one question at a time; fewer programs to compile


class Way(NamedTuple):
    """How an image is sent."""

    name: str
    server: int  # its number
    kind: str  # "stream", "int8", or an image codec
    quality: int = 0
    scale: float = 1.0


def ways_of(options: argparse.Namespace) -> tuple[list[Way], list[str]]:
    """The ways to measure, and for others why not."""
    ways, left_out = [], []
    for number, run in enumerate(options.runs):
        ways += [Way(f"{Path(run).name} {kind}", number, kind) for kind in ("stream", "int8")]
    for spec in dict.fromkeys(options.codec if options.base else ()):
        match = re.fullmatch(rf"({'|'.join(FORMATS)}):(\d+)(?:@(0?\.\d+|1))?", spec)
        if match is None or int(match[2]) > 100:
            raise SystemExit(f"--codec {spec}: give {', '.join(FORMATS)}, a quality up to 100 and a scale: avif:30@0.5")
        if match[1] == "jxl":
            left_out.append(f"{spec}: stepjax serve does not read JPEG XL")
        else:
            ways.append(Way(spec, len(options.runs), match[1], int(match[2]), float(match[3] or 1)))
    return ways, left_out


# The device -----------------------------------------------------------------------------------------------------------


def device(options: argparse.Namespace) -> None:
    """A child: prepares the questions, then answers each line of input, [way, number of the question], with a line."""
    import dataclasses

    from stepjax.config import DigitsSource, DocumentsSource
    from stepjax.data.records import open_source
    from stepjax.interop.orbax_directory import OrbaxDirectory
    from stepjax.processing.image_files import open_image
    from stepjax.rewards.verify import is_right
    from stepjax.tofc import client, codec
    from stepjax.tofc.device import Device

    config = OrbaxDirectory(options.runs[0]).run
    source = next(iter(config.evaluation.sources), None) if config is not None else None
    if config is None or not isinstance(source, DigitsSource | DocumentsSource):
        raise SystemExit(f"{options.runs[0]}: its first evaluation source is not of digits or documents")
    records = open_source(dataclasses.replace(source, split="held_out"), config.seed)
    count = WARM_UPS + len(options.rates) * len(MODES) * options.questions
    if len(records) < count:
        raise SystemExit(f"source {source.name}: has {len(records)} records, not {count}; ask fewer --questions")
    contents = [records[i]["messages"][0]["content"] for i in range(count)]
    if not all(sorted(item["type"] for item in content) == ["image", "text"] for content in contents):
        raise SystemExit(f"source {source.name}: its questions are not of an image and a text")
    images = [open_image(item["image"], name="") for content in contents for item in content if "image" in item]
    devices, (ways, _) = [Device(run) for run in options.runs], ways_of(options)
    servers = {way: client.Server(f"http://{SERVER_ADDRESS}:{PROXY_PORT + way.server}/v1") for way in ways}
    for each in devices:
        for image in images:  # compiles for every number of views
            each.features(image)
    # Its packets wait for the link, not for the network: TCP would take them for lost and send the last one twice.
    Path("/proc/sys/net/ipv4/tcp_early_retrans").write_text("0")  # of this namespace
    filler = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    print(json.dumps({"source": source.name, "task": source.task}), flush=True)

    for line in sys.stdin:
        way, mode, index = json.loads(line)
        way, image, (tokens, stays_open) = ways[way], images[index], MODES[mode]
        server = servers[way] if stays_open else client.Server(servers[way].url)
        time.sleep(REFILL)
        bytes_before, figures = sent_bytes(), {}
        began = time.perf_counter()
        if way.kind in ("stream", "int8"):
            tables = devices[way.server].tables
            tiles, columns = devices[way.server].features(image)
            encoded = time.perf_counter()
            data = (codec.encode if way.kind == "stream" else codec.encode_raw)(tables, tiles, columns=columns)
            part = {"type": "features", "features": {"bytes": len(data)}}
            figures["fp16"] = 2 * sum(tile.size for tile in tiles)
        else:
            encoded, file = began, io.BytesIO()
            size = [max(1, round(side * way.scale)) for side in image.size]
            made = image if way.scale == 1 else image.resize(size)
            made.save(
                file, FORMATS[way.kind], quality=way.quality, **({"optimize": True} if way.kind == "jpeg" else {})
            )
            data = file.getvalue()
            part = {"type": FILE, "format": way.kind, "size": image.size if way.scale < 1 else None}
            uri = len(f"data:image/{way.kind};base64,") + 4 * -(-len(data) // 3)
            figures["base64"] = uri - len(data)
        fields = {"max_tokens": tokens or config.evaluation.max_new_tokens, "temperature": 0.0}
        message = {"role": "user", "content": [part if "image" in item else item for item in contents[index]]}
        body = json.dumps({"messages": [message], **fields}, separators=(",", ":")).encode() + b"\n" + data
        coded = time.perf_counter()
        filler.sendto(bytes(FILLER), (SERVER_ADDRESS, 9))  # nobody listens there
        reply = server.post("application/octet-stream", body, 120.0)
        ended = time.perf_counter()
        if not stays_open:
            server.close()
        if reply.status != 200:
            raise SystemExit(f"{way.name}, question {index}: status {reply.status}: {reply.error.get('message')}")
        text = str(reply.fields["choices"][0]["message"]["content"] or "")
        figures |= {
            "times": [began, encoded, coded, ended],
            "data": len(data),
            "body": len(body),
            "wire": sent_bytes() - bytes_before - FILLER - 42,  # its headers
            "text": text,
            "right": is_right(records[index], text),
        }
        print(json.dumps(figures), flush=True)


def sent_bytes() -> int:
    """All that this namespace's link has sent, with headers of all layers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == LINK:
            return int(numbers.split()[8])
    raise SystemExit(f"no interface {LINK}")


# The proxy ------------------------------------------------------------------------------------------------------------


async def proxy(options: argparse.Namespace) -> None:
    """A child: one port for each server. Prints a line for each request: when it was handed on, and answered.

    Requests and replies are passed on whole, a delay after their last byte: nobody uses them before.
    """
    delay = options.delay_ms / 1e3

    async def connected(server: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delays = 3  # the handshake's two, and the request's own
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                head, body = await read_message(reader)
                await asyncio.sleep(delays * delay)
                delays = 1
                handed_on = time.perf_counter()
                head, body = as_the_server_reads_it(head, body)
                from_server, to_server = await asyncio.open_connection("127.0.0.1", SERVER_PORT + server)
                with contextlib.closing(to_server):
                    to_server.write(head + body)
                    reply = b"".join(await read_message(from_server))
                answered = time.perf_counter()
                print(json.dumps([handed_on, answered]), flush=True)
                await asyncio.sleep(delay)
                writer.write(reply)
                await writer.drain()

    def handler(server: int) -> Callable[..., Any]:
        return lambda reader, writer: connected(server, reader, writer)

    for number in range(len(options.runs) + bool(options.base)):
        await asyncio.start_server(handler(number), SERVER_ADDRESS, PROXY_PORT + number)
    print("listening", flush=True)
    await asyncio.Event().wait()


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a request or a reply."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head, re.IGNORECASE)
    return head, await reader.readexactly(int(length[1]) if length else 0)


def as_the_server_reads_it(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The same request, with an image file as a data URI and in the size that it had before the device shrank it."""
    from PIL import Image

    line, _, data = body.partition(b"\n")
    fields = json.loads(line)
    content = fields["messages"][0]["content"]
    [(place, part)] = [(place, part) for place, part in enumerate(content) if part["type"] != "text"]
    if part["type"] != FILE:
        return head, body
    kind = part["format"]
    if part["size"] is not None:
        file, kind = io.BytesIO(), "bmp"
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.resize(part["size"], Image.Resampling.BICUBIC).save(file, "BMP")
        data = file.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    content[place] = {"type": "image_url", "image_url": {"url": uri}}
    made = json.dumps(fields).encode()
    request, *_ = head.split(b"\r\n")
    lines = [request, b"host: 127.0.0.1", b"content-type: application/json", b"content-length: %d" % len(made)]
    return b"\r\n".join([*lines, b"", b""]), made


# Namespaces and processes ---------------------------------------------------------------------------------------------


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def remove_namespaces() -> None:
    """And what still runs in them."""
    there = {line.split()[0] for line in command("ip", "netns", "list").splitlines() if line.strip()}
    for name in {SERVER_SIDE, DEVICE_SIDE} & there:
        for pid in command("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        command("ip", "netns", "delete", name)


def make_namespaces() -> None:
    for name in (SERVER_SIDE, DEVICE_SIDE):
        command("ip", "netns", "add", name)
    pair = ["name", LINK, "netns", SERVER_SIDE, "type", "veth", "peer", "name", LINK, "netns", DEVICE_SIDE]
    command("ip", "link", "add", *pair)
    for name, address in ((SERVER_SIDE, SERVER_ADDRESS), (DEVICE_SIDE, DEVICE_ADDRESS)):
        command("ip", "-n", name, "address", "add", f"{address}/24", "dev", LINK)
        command("ip", "-n", name, "link", "set", LINK, "up")
        command("ip", "-n", name, "link", "set", "lo", "up")


def throttle(rate: float) -> None:
    """
    Args:
        rate: KB/s, of 1000 bytes.
    """
    tbf = ["tbf", "rate", f"{round(1000 * rate)}bps", "burst", str(BURST), "limit", str(QUEUE)]
    command("tc", "-n", DEVICE_SIDE, "qdisc", "replace", "dev", LINK, "root", *tbf)  # tc's bps are bytes


class Child:
    """A process in a namespace and on a core. It ends with the benchmark."""

    def __init__(self, stack: contextlib.ExitStack, namespace: str, core: int, words: list[str], log: IO[str]):
        self.log = log
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # which the child inherits
        try:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                process_group=0,  # Ctrl-C reaches the benchmark alone, which ends the others
            )
        finally:
            os.sched_setaffinity(0, before)
        stack.callback(self.end)

    def write(self, value: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.fail("has ended")
        return line

    def fail(self, why: str) -> None:
        self.log.seek(0)
        raise SystemExit(f"{' '.join(map(str, self.process.args))}: {why}\n{self.log.read()[-3000:]}")  # type: ignore[arg-type]

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_for_health(server: Child, port: int) -> None:
    ask = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/health', timeout=5)"
    end = time.monotonic() + START_SECONDS
    while subprocess.run(
        ["ip", "netns", "exec", SERVER_SIDE, sys.executable, "-c", ask], stderr=subprocess.DEVNULL
    ).returncode:
        if server.process.poll() is not None:
            server.fail("has ended")
        if time.monotonic() > end:
            server.fail(f"is not up after {START_SECONDS} seconds")
        time.sleep(1)


# Measurement ----------------------------------------------------------------------------------------------------------


TIMES = ("encoder", "coder", "encode", "send", "answer", "total")


class Question(NamedTuple):
    """What one question took, in milliseconds and bytes."""

    encoder: float
    coder: float
    encode: float  # both
    send: float
    answer: float
    total: float
    sizes: dict[str, int]
    right: bool


Measured = dict[float, dict[str, dict[str, list[Question]]]]  # by rate, mode and way


def measure(options: argparse.Namespace, cores: list[int]) -> tuple[Measured, str]:
    """Returns the questions, and the name of their source."""
    ways, _ = ways_of(options)
    made: Measured = {rate: {mode: {way.name: [] for way in ways} for mode in MODES} for rate in options.rates}
    with contextlib.ExitStack() as stack:
        remove_namespaces()
        stack.callback(remove_namespaces)
        make_namespaces()

        def start(namespace: str, core: int, *words: str) -> Child:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            return Child(stack, namespace, core, [*words], log)

        def part(name: str) -> list[str]:
            return [sys.executable, __file__, *sys.argv[1:], "--part", name]

        sizes = [word for name, size in ENGINE.items() for word in (f"--engine.{name.replace('_', '-')}", str(size))]
        for number, run in enumerate([*options.runs, *([options.base] if options.base else [])]):
            print(f"starting the server of {run}", flush=True)
            serve = [str(Path(sys.executable).with_name("stepjax")), "serve", run, "--port", str(SERVER_PORT + number)]
            serve += ["--dtype", "float32", "--hosts", SERVER_ADDRESS, "127.0.0.1", *sizes]
            wait_for_health(start(SERVER_SIDE, cores[-1], *serve), SERVER_PORT + number)
        between = start(SERVER_SIDE, cores[-1], *part("proxy"))
        between.line()
        asking = start(DEVICE_SIDE, cores[0], *part("device"))
        source = json.loads(asking.line())

        def ask(way: int, mode: str, index: int) -> Question:
            asking.write([way, mode, index])
            reply = json.loads(asking.line())
            began, encoded, coded, ended = reply["times"]
            handed_on, answered = json.loads(between.line())
            counts = {name: reply[name] for name in ("data", "body", "wire", "fp16", "base64") if name in reply}
            return Question(
                encoder=1e3 * (encoded - began),
                coder=1e3 * (coded - encoded),
                encode=1e3 * (coded - began),
                send=1e3 * (handed_on - coded),
                answer=1e3 * (answered - handed_on),
                total=1e3 * (ended - began),
                sizes=counts,
                right=reply["right"],
            )

        for way in range(len(ways)):
            for index in range(WARM_UPS):
                ask(way, "whole answer", index)
        turns = [(rate, mode) for rate in options.rates for mode in MODES]
        for number in range(options.questions):
            print(f"question {number + 1} of {options.questions}", flush=True)
            for place, (rate, mode) in enumerate(turns):
                throttle(rate)
                for turn in range(len(ways)):
                    way = (turn + number) % len(ways)  # no way is always first
                    question = ask(way, mode, WARM_UPS + place * options.questions + number)
                    made[rate][mode][ways[way].name].append(question)
    return made, f"{source['source']} ({source['task']})"


def summary(questions: list[Question], rate: float) -> dict[str, Any]:
    """Median and 95th percentile of milliseconds, means of bytes, and how many answers are right."""
    times = {name: [getattr(question, name) for question in questions] for name in TIMES}
    if "base64" in questions[0].sizes:  # bytes over KB/s are milliseconds
        times["data_uri_total"] = [question.total + question.sizes["base64"] / rate for question in questions]
    figures: dict[str, Any] = {
        f"{name}_ms": {"median": round(percentile(values, 0.5), 2), "percentile_95": round(percentile(values, 0.95), 2)}
        for name, values in times.items()
    }
    for name in questions[0].sizes:
        figures[f"{name}_bytes"] = round(statistics.mean(question.sizes[name] for question in questions), 1)
    return figures | {"right": sum(question.right for question in questions), "questions": len(questions)}


def percentile(values: list[float], share: float) -> float:
    """Interpolated between neighbours."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def show(figures: dict[str, dict[str, dict[str, Any]]], options: argparse.Namespace, left_out: list[str]) -> None:
    first = next(iter(next(iter(figures.values())).values()))
    width = 2 + max(map(len, first))
    heads = ("data", "body", "on wire", "encode", "send", "answer", "total", "95 %", "data URI", "right")
    for rate, mode in ((rate, mode) for rate in figures for mode in MODES):
        print(f"\n{rate} KB/s, {mode}: mean bytes; milliseconds, medians and for the total the 95th percentile")
        print(" " * width + "".join(f"{head:>10}" for head in heads))
        for name, made in figures[rate][mode].items():
            row = [f"{made[f'{size}_bytes']:,.0f}" for size in ("data", "body", "wire")]
            row += [f"{made[f'{part}_ms']['median']:,.1f}" for part in ("encode", "send", "answer", "total")]
            uri, right = made.get("data_uri_total_ms"), f"{made['right']}/{made['questions']}"
            row += [f"{made['total_ms']['percentile_95']:,.1f}", "" if uri is None else f"{uri['median']:,.1f}"]
            row += [right if MODES[mode][0] is None else ""]
            print(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in row))
    print("\nnot measured:")
    for name, made in first.items():
        if name.endswith(" int8"):
            times = ", ".join(f"{made['fp16_bytes'] / rate:,.0f}" for rate in options.rates)
            rates = ", ".join(f"{rate:g}" for rate in options.rates)
            what = f"{made['fp16_bytes']:,.0f} bytes, which take {times} ms at {rates} KB/s"
            print(f"  {name.removesuffix('int8')}fp16: the server does not read it; {what}")
    for each in left_out:
        print(f"  {each}")
    if not options.base:
        print("  image files: name a run without a codec with --base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", default=["runs/documents_tofc_lambda_0.05"])
    parser.add_argument(
        "--base",
        metavar="RUN",
        default="runs/documents_sft_control",
        help="the run without a codec, which gets image files",
    )
    parser.add_argument("--codec", action="append", metavar="NAME:QUALITY[@SCALE]", help="jpeg, webp or avif")
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 50, 100], help="KB/s, of 1000 bytes")
    parser.add_argument("--questions", type=int, default=15, help="of each way, rate and mode")
    parser.add_argument("--delay-ms", type=float, default=10, help="of each direction")
    parser.add_argument("--part", choices=["device", "proxy"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.codec = options.codec or ["webp:40@0.35", "avif:30@0.5", "webp:25@0.5", "jpeg:25@0.5"]
    options.runs = list(dict.fromkeys(options.runs))
    options.rates = list(dict.fromkeys(options.rates))
    if options.part == "device":
        device(options)
        return
    if options.part == "proxy":
        asyncio.run(proxy(options))
        return
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if os.geteuid() != 0:
        raise SystemExit("must run as root: it makes network namespaces")
    if missing:
        raise SystemExit(f"needs {' and '.join(missing)}: install iproute2")
    if options.questions < 1 or min(options.rates) * REFILL * 1000 < BURST:
        raise SystemExit(f"--questions must be at least 1, and --rates at least {BURST / REFILL / 1000:g}")
    ways, left_out = ways_of(options)
    import machine

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cores = sorted(os.sched_getaffinity(0))
    made, source = measure(options, cores)
    figures = {
        f"{rate:g}": {
            mode: {name: summary(questions, rate) for name, questions in by_way.items()}
            for mode, by_way in by_mode.items()
        }
        for rate, by_mode in made.items()
    }
    print(
        f"\n{options.questions} held-out questions of {source} for each way, rate and mode; "
        f"{options.delay_ms:g} ms of delay each way"
    )
    print(f"device on core {cores[0]}, each server on core {cores[-1]} alone")
    show(figures, options, left_out)
    path = machine.write(
        "tofc_network",
        {
            "command": " ".join(["python", "benchmarks/tofc_network.py", *sys.argv[1:]]),
            "source": source,
            "delay_ms": options.delay_ms,
            "burst_bytes": BURST,
            "device_cores": [cores[0]],
            "server_cores": [cores[-1]],
            "ways": [way._asdict() for way in ways],
            "left_out": left_out,
            "rates_KB_s": figures,
        },
    )
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

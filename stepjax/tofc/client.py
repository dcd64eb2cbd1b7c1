"""A device asks a server about an image: as a coded stream, and in other forms by a policy if that cannot be read.

    stream    the features, coded
    int8      the same features as int8, for a server with another entropy model for the same encoder
    jpeg      the image, for any server

Of a stream of which the server says that some tiles arrived damaged, these alone are sent again.

It speaks HTTP by the standard library, follows no redirect and uses no proxy. The server's side of it, with the
errors that decide what comes next, is in docs/serving.md.
"""

import base64
import dataclasses
import http.client
import io
import json
import socket
import ssl
import threading
import time
import urllib.parse
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from stepjax.errors import BitstreamError, ConfigError, RefusedError, UnreachableError, require, require_positive
from stepjax.tofc import codec
from stepjax.tofc.tables import Tables

Kind = Literal["stream", "int8", "jpeg"]

_MAX_REPLY = 4 * 2**20  # bytes
_PAUSE, _MAX_PAUSE = 0.2, 5.0  # seconds before a resend to a busy server; the pause doubles each time
# A 400 that another form of the image may avoid.
_OF_THE_FORM = ("corrupt_stream", "features_not_supported")
_OWN = codec.Limits(frame_bytes=2**40, tiles=2**20, features=2**20)  # this end need not protect itself from its frames
_MAX_NAME = 64  # characters of a frame's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What a device sends, and for how long."""

    kinds: tuple[Kind, ...] = ("stream", "int8", "jpeg")  # the next one if the server cannot read this one
    resends: int = 2  # of each kind, if it arrives damaged, or the server is busy, fails or does not answer
    seconds: float = 60.0  # for everything
    jpeg_quality: int = 85

    def __post_init__(self):
        require("policy", self, kinds=(bool(self.kinds), "name at least one of stream, int8, jpeg"))
        require("policy", self, resends=(self.resends >= 0, "must not be negative"))
        require("policy", self, jpeg_quality=(1 <= self.jpeg_quality <= 100, "must be 1 to 100"))
        require_positive("policy", self, "seconds")


class Encoder(Protocol):
    """What is needed of a `stepjax.tofc.device.Device`."""

    tables: Tables

    def features(self, image: Image.Image) -> tuple[list[np.ndarray], int]: ...


class Attempt(NamedTuple):
    """One request, or a kind that the image could not be encoded as."""

    kind: Kind
    sent: int  # bytes of the body
    status: int | None  # None: there was no reply
    reason: str  # the error's code or message; "" for the answer
    tiles: tuple[int, ...] = ()  # only these were sent, again

    @property
    def form(self) -> str:
        return f"tiles {', '.join(map(str, self.tiles))} of {self.kind}" if self.tiles else self.kind


class Answer(NamedTuple):
    """
    Attributes:
        text: without reasoning.
        finish_reason: "length" if it is cut off by `max_tokens`, perhaps within its reasoning.
        kind: what the server read.
        attempts: all requests, in order; the last one is the answer's.
        encode_ms: on the device, of all kinds that were sent.
        send_ms: connecting, and handing the last request to the network.
        answer_ms: from there to the end of the reply.
    """

    text: str
    finish_reason: str
    kind: Kind
    attempts: tuple[Attempt, ...]
    encode_ms: float
    send_ms: float
    answer_ms: float


def ask(
    server: "Server",
    device: Encoder,
    image: Image.Image,
    prompt: str,
    *,
    prompt_first: bool = False,
    policy: Policy | None = None,
    **fields: Any,
) -> Answer:
    """Asks a question about an image.

    Args:
        image: RGB.
        prompt_first: whether the question comes before the image, for a model that was trained so.
        fields: of the chat request, such as `max_tokens`.

    Raises:
        ImageError: the image cannot be cut into views.
        RefusedError: the server refuses the question, or every kind of image that the policy has.
        UnreachableError: the server does not answer, is too busy or fails, as often or as long as the policy tries.
    """
    policy = policy or Policy()
    end, attempts = time.monotonic() + policy.seconds, []
    encode_ms, features, reason = 0.0, None, ""
    for kind in policy.kinds:
        began = time.perf_counter()
        try:
            if kind != "jpeg" and features is None:
                features = device.features(image)
            part, stream = _part(kind, device.tables, features, image, policy.jpeg_quality)
        except BitstreamError as unfit:
            reason = str(unfit)
            attempts.append(Attempt(kind, 0, None, reason))
            continue
        finally:
            encode_ms += 1e3 * (time.perf_counter() - began)
        frame, tiles = "", ()
        for resend in range(policy.resends + 1):
            media_type, body = _body(part, stream, prompt, prompt_first, fields, frame, tiles)
            reply = server.post(media_type, body, end - time.monotonic())
            if reply.status == 200:
                attempts.append(Attempt(kind, len(body), 200, "", tiles))
                text, finish = _text(reply.fields, attempts)
                return Answer(text, finish, kind, tuple(attempts), encode_ms, reply.send_ms, reply.answer_ms)
            error = reply.error
            reason = str(error.get("message") or f"status {reply.status}")
            attempts.append(Attempt(kind, len(body), reply.status, str(error.get("code") or reason), tiles))
            frame, tiles = _damaged(error, stream)
            is_damaged, is_busy = error.get("retryable") is True, _is_busy(reply.status)
            if not (is_damaged or is_busy):
                break
            if is_busy:
                pause = min(max(_PAUSE * 2**resend, reply.retry_after), _MAX_PAUSE)
                if resend == policy.resends or time.monotonic() + pause >= end:
                    raise UnreachableError(
                        f"{server.url}: no answer in {len(attempts)} attempts: {reason}", tuple(attempts)
                    )
                time.sleep(pause)
        if not (is_damaged or _is_of_the_form(reply.status, error.get("code"))):
            raise RefusedError(f"{server.url}: {reason}", tuple(attempts))
    raise RefusedError(f"{server.url}: cannot read any of {', '.join(policy.kinds)}: {reason}", tuple(attempts))


def _is_busy(status: int | None) -> bool:
    return status is None or status in (408, 429) or status >= 500


def _is_of_the_form(status: int | None, code: Any) -> bool:
    """Whether the server refuses this form of the image and perhaps not the next. Other servers, which know no
    features, give no code of ours.
    """
    return status in (409, 413, 415, 422) or (status == 400 and (not isinstance(code, str) or code in _OF_THE_FORM))


def _part(
    kind: Kind, tables: Tables, features: tuple[list[np.ndarray], int] | None, image: Image.Image, quality: int
) -> tuple[dict[str, Any], bytes]:
    """The image as a part of the request's content, and its stream; "" if it has none."""
    if features is not None and kind != "jpeg":
        encode = codec.encode if kind == "stream" else codec.encode_raw
        return {"type": "features"}, encode(tables, features[0], columns=features[1])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}, b""


def _damaged(error: dict[str, Any], stream: bytes) -> tuple[str, tuple[int, ...]]:
    """The name that the server gives to a stream, and the tiles of it that it wants again; none: the whole stream."""
    frame, tiles = error.get("frame"), error.get("tiles")
    if not stream or not isinstance(frame, str) or len(frame) > _MAX_NAME or not isinstance(tiles, list):
        return "", ()
    count = len(codec.pieces(stream, limits=_OWN))
    is_known = len(tiles) <= count and all(type(tile) is int and 0 <= tile < count for tile in tiles)
    return (frame, tuple(tiles)) if is_known else ("", ())


def _body(
    part: dict[str, Any],
    stream: bytes,
    prompt: str,
    prompt_first: bool,
    fields: dict[str, Any],
    frame: str,
    tiles: tuple[int, ...],
) -> tuple[str, bytes]:
    """Media type and body of a request.

    Args:
        tiles: only these of the stream, which the server has as `frame`; (): all of it.
    """
    if tiles:
        pieces = codec.pieces(stream, limits=_OWN)
        stream = b"".join(pieces[tile] for tile in tiles)
        part = part | {"features": {"bytes": len(stream), "resend": {"frame": frame, "tiles": tiles}}}
    elif stream:
        part = part | {"features": {"bytes": len(stream)}}
    content = [part, {"type": "text", "text": prompt}][:: -1 if prompt_first else 1]
    line = json.dumps({"messages": [{"role": "user", "content": content}], **fields}, separators=(",", ":")).encode()
    return ("application/octet-stream", line + b"\n" + stream) if stream else ("application/json", line)


def _text(fields: dict[str, Any], attempts: list[Attempt]) -> tuple[str, str]:
    """The answer, and why it ends."""
    try:
        choice = fields["choices"][0]
        return str(choice["message"]["content"] or ""), str(choice.get("finish_reason"))
    except (KeyError, IndexError, TypeError):
        raise RefusedError("the reply is not a chat completion", tuple(attempts)) from None


class _Reply(NamedTuple):
    status: int | None  # None: there was none
    fields: dict[str, Any] = {}
    retry_after: float = 0.0  # seconds
    send_ms: float = 0.0
    answer_ms: float = 0.0
    was_closed: bool = False  # by the other end, before a reply

    @property
    def error(self) -> dict[str, Any]:
        error = self.fields.get("error")
        return error if isinstance(error, dict) else {}


class Server:
    """A server's chat API, for one thread at a time. The connection stays open for the next question.

    Args:
        url: of its API, such as "http://192.168.0.7:8000/v1".

    Raises:
        ConfigError: the URL is not one.
    """

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"URL {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigError(f"URL {url!r}: give an http or https URL, such as http://127.0.0.1:8000/v1")
        self._path = f"{parts.path.rstrip('/')}/chat/completions"
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._connection = (
            http.client.HTTPConnection(parts.hostname, port)
            if parts.scheme == "http"
            else http.client.HTTPSConnection(parts.hostname, port, context=ssl.create_default_context())
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def post(self, media_type: str, body: bytes, seconds: float) -> "_Reply":
        """One request. What fails or takes longer has no status, and the reason as its error."""
        end = time.monotonic() + seconds
        is_old = self._connection.sock is not None
        reply = self._posted(media_type, body, seconds)
        if reply.was_closed and is_old:  # a server closes connections that are idle, and may do so just now
            reply = self._posted(media_type, body, end - time.monotonic())
        return reply

    def _posted(self, media_type: str, body: bytes, seconds: float) -> "_Reply":
        if seconds <= 0:
            return _failed("the time is up")
        connection = self._connection
        connection.timeout = seconds
        if connection.sock is not None:
            connection.sock.settimeout(seconds)
        # A socket's timeout is of one operation: a server that trickles would take for ever.
        is_over = threading.Event()
        timer = threading.Timer(seconds, _shut, [connection, is_over])
        timer.daemon = True
        timer.start()
        began, stays_open = time.perf_counter(), False
        try:
            try:
                connection.putrequest("POST", self._path, skip_accept_encoding=True)  # each header costs bytes
                headers = {"content-type": media_type, "content-length": str(len(body)), **self._headers}
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # It may have answered before it had read all: too large, or no key.
            sent = time.perf_counter()
            response = connection.getresponse()
            data = response.read(_MAX_REPLY + 1)
            ended = time.perf_counter()
            if len(data) > _MAX_REPLY:
                return _failed(f"the reply is larger than {_MAX_REPLY} bytes")
            if is_over.is_set() or response.length:
                return _failed("the time is up" if is_over.is_set() else "the reply ends early")
            after, stays_open = response.headers.get("retry-after", ""), response.isclosed()
        except (BrokenPipeError, ConnectionResetError) as error:
            return _failed(str(error) or type(error).__name__, was_closed=not is_over.is_set())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return _failed(str(error) or type(error).__name__)
        finally:
            timer.cancel()
            if not stays_open:
                connection.close()
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            if response.status == 200:
                return _failed("the reply is not JSON")
            fields = None
        fields = fields if isinstance(fields, dict) else {}
        pause = float(after) if after.isdecimal() else 0.0
        return _Reply(response.status, fields, pause, 1e3 * (sent - began), 1e3 * (ended - sent))


def _failed(reason: str, *, was_closed: bool = False) -> _Reply:
    return _Reply(None, {"error": {"message": reason}}, was_closed=was_closed)


def _shut(connection: http.client.HTTPConnection, is_over: threading.Event) -> None:
    is_over.set()
    sock = connection.sock
    if sock is not None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has just ended
            pass

"""Merged features to bytes and back, in NumPy: no JAX is needed on either end.

Legend: N features of a tile, M features of all tiles, C channels, E experts, Z latents.

A tile is a view's merged features. The router picks each feature's expert, the expert's analysis gives latents, and of
these its synthesis gives a mean and a scale for every channel. Sent are the expert, the latents, and

    r = round((x - offset) / step - mean)     and the receiver has     x' = offset + step (mean + r)

The mean is a multiple of 1/16, an integer like the scale's index (see `stepjax.tofc.tables`): receivers agree on x' to
the bit. The same features give the same bytes on every machine and in every batch, too.

    frame    0xF1: magic and version | 4 bytes of the model's SHA-256 | tiles | columns | for each tile: features, bytes
             | the tiles
    tile     experts, digits of one integer | length, latents | length, escapes | residuals | CRC-32

Numbers are varints. A tile's CRC continues that of the tile before, the first's that of the header: a tile or a
header of another frame does not fit. A damaged tile does not hide the next one's CRC: it continues the CRC that was
sent. So all damaged tiles are known, and `pieces` of them alone can be sent again (`mended`).

A raw frame needs no entropy model, for receivers that have another one of the same encoder. It differs in

    frame    0xF9: magic, raw and version | 4 bytes of the SHA-256 of the model's origin | ...
    tile     a float32 scale for each feature | int8 values, times their feature's scale | CRC-32
"""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepjax.config import ImageConfig
from stepjax.errors import (
    BitstreamError,
    CorruptStreamError,
    ImageError,
    StreamLimitError,
    UnknownModelError,
    require_positive,
)
from stepjax.processing.images import CodedImage
from stepjax.tofc import range_coder
from stepjax.tofc.range_coder import read_varint, varint
from stepjax.tofc.tables import LIMIT, MAX_LATENT, MAX_MEAN, NUM_SCALES, UNIT, Tables

MAGIC, VERSION, RAW = 0xF0, 1, 8
MAX_RESIDUAL = 1 << 19  # steps; within, mean + r is exact in float32
_HASH_BYTES, _CRC_BYTES = 4, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a receiver accepts. The values decoded are at most tiles * features * the model's channels."""

    frame_bytes: int = 1 << 20
    tiles: int = 129  # an image's global view and crops
    features: int = 64  # of a tile

    def __post_init__(self):
        require_positive("limits", self, "frame_bytes", "tiles", "features")


class Frame(NamedTuple):
    """A frame whose header and checksums hold."""

    model: str  # `Tables.id`; of a raw frame `Tables.features_id`
    is_raw: bool
    columns: int  # of the grid of crops, which are tiles row by row; 0 without a grid
    features: tuple[int, ...]  # of every tile
    payloads: tuple[bytes, ...]


def encode(tables: Tables, tiles: Sequence[np.ndarray] | np.ndarray, *, columns: int = 0) -> bytes:
    """A frame of tiles [N, C], which may differ in N; an array [tiles, N, C] is a sequence of them.

    Args:
        columns: see `Frame`.

    Raises:
        BitstreamError: a tile has another shape, or a value that is not finite or too far from the others.
    """
    tiles = _checked(tables, tiles)
    ends = np.cumsum([len(tile) for tile in tiles])
    codes = [np.split(part, ends[:-1]) for part in analyse(tables, np.concatenate(tiles))]
    payloads = [_encode_tile(tables, *(part[tile] for part in codes)) for tile in range(len(tiles))]
    return _frame(0, tables.id, [len(tile) for tile in tiles], columns, payloads)


def encode_raw(tables: Tables, tiles: Sequence[np.ndarray] | np.ndarray, *, columns: int = 0) -> bytes:
    """The same features as int8 with a scale each, without the entropy model: about a byte a value.

    Raises:
        BitstreamError: a tile has another shape, or a value that is not finite.
    """
    tiles, payloads = _checked(tables, tiles), []
    for x_NC in tiles:
        scales_N = (np.abs(x_NC).max(axis=1) / 127).astype("<f4")
        values_NC = np.rint(x_NC / np.where(scales_N == 0, 1, scales_N)[:, None]).clip(-127, 127)
        payloads.append(scales_N.tobytes() + values_NC.astype(np.int8).tobytes())
    return _frame(RAW, tables.features_id, [len(tile) for tile in tiles], columns, payloads)


def _checked(tables: Tables, tiles: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    tiles = [np.asarray(tile, np.float32) for tile in tiles]
    if not tiles:
        raise BitstreamError("tiles=[]: there must be at least one")
    for index, tile in enumerate(tiles):
        if tile.ndim != 2 or not len(tile) or tile.shape[1] != tables.channels:
            raise BitstreamError(f"tiles[{index}]: its shape is {tile.shape}, not (features, {tables.channels})")
        if not np.isfinite(tile).all():
            raise BitstreamError(f"tiles[{index}]: has values that are not finite")
    return tiles


def _frame(kind: int, model: str, features: list[int], columns: int, payloads: list[bytes]) -> bytes:
    lengths = [varint(count) + varint(len(payload)) for count, payload in zip(features, payloads, strict=True)]
    header = bytes([MAGIC | VERSION | kind]) + bytes.fromhex(model) + varint(len(features)) + varint(columns)
    header += b"".join(lengths)
    frame, crc = bytearray(header), zlib.crc32(header)
    for payload in payloads:
        crc = zlib.crc32(payload, crc)
        frame += payload + crc.to_bytes(_CRC_BYTES, "little")
    return bytes(frame)


def parse(data: bytes, *, limits: Limits | None = None) -> Frame:
    """A frame's parts, without decoding: what a server needs to lay out a prompt.

    Raises:
        CorruptStreamError: it is no frame, truncated, or damaged.
        StreamLimitError: it is larger than the limits.
        UnknownModelError: its format has another version.
    """
    columns, features, bounds = _layout(data, limits or Limits())
    crc, payloads, damaged = zlib.crc32(data[: bounds[0]]), [], []
    for tile, (start, end) in enumerate(itertools.pairwise(bounds)):
        payload = bytes(data[start : end - _CRC_BYTES])
        sent = int.from_bytes(data[end - _CRC_BYTES : end], "little")
        if zlib.crc32(payload, crc) != sent:
            damaged.append(tile)
        crc = sent
        payloads.append(payload)
    if damaged:
        raise CorruptStreamError(f"tiles {damaged}: checksums do not match; send them again", tiles=damaged)
    model, is_raw = bytes(data[1 : 1 + _HASH_BYTES]).hex(), bool(data[0] & RAW)
    return Frame(model, is_raw, columns, tuple(features), tuple(payloads))


def pieces(data: bytes, *, limits: Limits | None = None) -> list[bytes]:
    """A frame cut into its tiles, each with its checksum and the first with the header, which that covers, too.

    Raises as `parse`, but does not compare checksums.
    """
    bounds = _layout(data, limits or Limits())[2]
    return [data[start:end] for start, end in itertools.pairwise([0, *bounds[1:]])]


def mended(data: bytes, tiles: Sequence[int], sent: bytes, *, limits: Limits | None = None) -> bytes:
    """A frame of which some pieces are replaced by those that were sent again, for `parse` to check.

    Args:
        tiles: whose `pieces`, in order.
        sent: those, one after another.

    Raises:
        CorruptStreamError: the frame has not such tiles, or they have other lengths: then its header is damaged.
    """
    parts, position = pieces(data, limits=limits), 0
    is_fit = 0 < len(tiles) <= len(parts) and all(0 <= tile < len(parts) for tile in tiles)
    if not is_fit or sorted(set(tiles)) != list(tiles) or sum(len(parts[tile]) for tile in tiles) != len(sent):
        raise CorruptStreamError(f"{len(tiles)} tiles of {len(sent)} bytes: not the frame's; send it whole")
    for tile in tiles:
        end = position + len(parts[tile])
        parts[tile], position = sent[position:end], end
    return b"".join(parts)


def _layout(data: bytes, limits: Limits) -> tuple[int, list[int], list[int]]:
    """Columns, the features of every tile, and where each begins; then, where the last ends."""
    if len(data) > limits.frame_bytes:
        raise StreamLimitError(f"frame of {len(data)} bytes: the limit is {limits.frame_bytes}")
    if len(data) < 1 + _HASH_BYTES or data[0] & 0xF0 != MAGIC:
        raise CorruptStreamError(f"frame of {len(data)} bytes: does not begin as one")
    if data[0] & ~RAW != MAGIC | VERSION:
        raise UnknownModelError(f"frame of version {data[0] & 7}: this receiver reads version {VERSION}")
    num_tiles, position = read_varint(data, 1 + _HASH_BYTES)
    _check_limit("tiles", num_tiles, limits.tiles)
    columns, position = read_varint(data, position)
    features, lengths = [], []
    for _ in range(num_tiles):
        count, position = read_varint(data, position)
        _check_limit("features of a tile", count, limits.features)
        length, position = read_varint(data, position)
        features.append(count)
        lengths.append(length + _CRC_BYTES)
    if position + sum(lengths) != len(data):
        raise CorruptStreamError(f"frame of {len(data)} bytes: its header says otherwise; send it again")
    return columns, features, list(itertools.accumulate(lengths, initial=position))


def model_of(tables: Tables | Sequence[Tables], frame: Frame) -> Tables:
    """The entropy model of a frame, or for a raw one a model of the same features.

    Args:
        tables: the entropy model, or all that the receiver has.

    Raises:
        CorruptStreamError: a raw tile has not as many bytes as its features.
        UnknownModelError: there is none.
    """
    models = [tables] if isinstance(tables, Tables) else tables
    known = {each.features_id if frame.is_raw else each.id: each for each in models}
    if frame.model not in known:
        what = "raw frame of encoder" if frame.is_raw else "frame of entropy model"
        message = f"{what} {frame.model}: this receiver has {', '.join(known)}"
        raise UnknownModelError(message, accepted=list(known))
    model = known[frame.model]
    for tile, (count, payload) in enumerate(zip(frame.features, frame.payloads, strict=True)):
        if frame.is_raw and len(payload) != count * (4 + model.channels):
            raise CorruptStreamError(f"tile {tile}: {len(payload)} bytes of {count} raw features", tiles=[tile])
    return model


def decode(tables: Tables | Sequence[Tables], data: bytes, *, limits: Limits | None = None) -> list[np.ndarray]:
    """The float32 features [N, C] of every tile of a frame.

    Args:
        tables: the entropy model, or all that the receiver has.

    Raises:
        CorruptStreamError: it is no frame, truncated, or damaged.
        StreamLimitError: it is larger than the limits.
        UnknownModelError: it was made with none of these models, or its format has another version.
    """
    return _tiles(tables, parse(data, limits=limits))


def decode_image(
    tables: Tables | Sequence[Tables], data: bytes, images: ImageConfig, *, limits: Limits | None = None
) -> CodedImage:
    """A device's frame as the model reads it, in an image's place.

    Raises:
        CorruptStreamError, StreamLimitError, UnknownModelError: as `decode`; also corrupt if no image has such views.
    """
    frame = parse(data, limits=limits)
    try:
        return CodedImage.of(_tiles(tables, frame), frame.columns, images)
    except ImageError as error:
        raise CorruptStreamError(f"frame of {len(data)} bytes: {error}") from error


def _tiles(tables: Tables | Sequence[Tables], frame: Frame) -> list[np.ndarray]:
    model, tiles = model_of(tables, frame), []
    for tile, (payload, count) in enumerate(zip(frame.payloads, frame.features, strict=True)):
        try:
            tiles.append(_decode_raw(payload, count) if frame.is_raw else _decode_tile(model, payload, count))
        except CorruptStreamError as error:
            raise CorruptStreamError(f"tile {tile}: {str(error).removeprefix('tile: ')}", tiles=[tile]) from None
    return tiles


def analyse(tables: Tables, x_MC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The integers that are coded: experts [M], latents [M, Z], scale indices [M, C] and residuals [M, C].

    Raises:
        BitstreamError: a value is too far from the others.
    """
    with np.errstate(over="ignore"):  # what overflows is refused below
        centred_MC = x_MC - tables.arrays["offset"]
    input_MC = np.clip(np.rint(centred_MC * (UNIT / tables.arrays["spread"])), -LIMIT, LIMIT)
    experts_M = np.argmax(tables.network("router", input_MC), axis=1)
    latents_MZ = np.empty((len(x_MC), tables.num_latents), np.int64)
    for expert, chosen in _by_expert(experts_M):
        latents_MZ[chosen] = np.clip(tables.network("analysis", input_MC[chosen], expert), -MAX_LATENT, MAX_LATENT)
    scales_MC, means_MC = synthesise(tables, experts_M, latents_MZ)
    residuals_MC = np.rint(centred_MC / tables.arrays["step"][experts_M] - means_MC)
    if np.abs(residuals_MC).max() > MAX_RESIDUAL:
        feature, channel = np.unravel_index(np.abs(residuals_MC).argmax(), residuals_MC.shape)
        raise BitstreamError(f"channel {channel}={x_MC[feature, channel]}: too far from the channel's usual values")
    return experts_M, latents_MZ, scales_MC, residuals_MC.astype(np.int64)


def costs(tables: Tables, x_MC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each feature its expert [M], and the bits [M] that it adds to a tile: expert, latents, residuals and escapes.

    Raises:
        BitstreamError: a value is too far from the others.
    """
    experts_M, latents_MZ, scales_MC, residuals_MC = analyse(tables, x_MC)
    symbols, beyond = _symbols(tables, scales_MC.reshape(-1), residuals_MC.reshape(-1))
    of_values = tables.value_coder.bits(symbols, scales_MC.reshape(-1))
    of_values[beyond >= 0] += [8 * len(varint(2 * excess)) for excess in beyond[beyond >= 0].tolist()]
    of_latents = tables.latent_coder.bits(latents_MZ.reshape(-1) + MAX_LATENT, _latent_tables(tables, experts_M))
    bits_M = of_values.reshape(len(x_MC), -1).sum(axis=1) + of_latents.reshape(len(x_MC), -1).sum(axis=1)
    return experts_M, bits_M + np.log2(tables.num_experts)


def synthesise(tables: Tables, experts_M: np.ndarray, latents_MZ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every channel's scale index [M, C] and mean [M, C], in steps; of integers alone, and exact."""
    out_MO = np.empty((len(experts_M), 2 * tables.channels), np.float32)
    for expert, chosen in _by_expert(experts_M):
        out_MO[chosen] = tables.network("synthesis", latents_MZ[chosen], expert)
    scales_MC = np.clip(out_MO[:, : tables.channels], 0, NUM_SCALES - 1).astype(np.int64)
    return scales_MC, np.clip(out_MO[:, tables.channels :], -MAX_MEAN, MAX_MEAN) / np.float32(UNIT)


def _by_expert(experts_M: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return [(int(expert), np.flatnonzero(experts_M == expert)) for expert in np.unique(experts_M)]


def _latent_tables(tables: Tables, experts_N: np.ndarray) -> np.ndarray:
    return (experts_N[:, None] * tables.num_latents + np.arange(tables.num_latents)).reshape(-1)


def _expert_bytes(tables: Tables, count: int) -> int:
    return ((tables.num_experts**count - 1).bit_length() + 7) // 8


def _symbols(tables: Tables, scales: np.ndarray, residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symbols of residuals, and how far those that are escapes are beyond their table; negative within it."""
    radii = tables.arrays["radius"][scales].astype(np.int64)
    beyond = np.abs(residuals) - radii - 1
    return np.where(beyond >= 0, 2 * radii + 1, residuals + radii), beyond


def _encode_tile(
    tables: Tables, experts_N: np.ndarray, latents_NZ: np.ndarray, scales_NC: np.ndarray, residuals_NC: np.ndarray
) -> bytes:
    packed = sum(expert * tables.num_experts**place for place, expert in enumerate(experts_N.tolist()))
    latents = range_coder.encode(
        tables.latent_coder, latents_NZ.reshape(-1) + MAX_LATENT, _latent_tables(tables, experts_N)
    )
    scales, residuals = scales_NC.reshape(-1), residuals_NC.reshape(-1)
    symbols, beyond = _symbols(tables, scales, residuals)
    is_escape = beyond >= 0
    escapes = b"".join(
        varint(2 * excess + sign)
        for excess, sign in zip(beyond[is_escape].tolist(), (residuals[is_escape] < 0).tolist(), strict=True)
    )
    values = range_coder.encode(tables.value_coder, symbols, scales)
    experts = packed.to_bytes(_expert_bytes(tables, len(experts_N)), "little")
    return experts + varint(len(latents)) + latents + varint(len(escapes)) + escapes + values


def _decode_tile(tables: Tables, data: bytes, count: int) -> np.ndarray:
    position = _expert_bytes(tables, count)
    packed, digits = int.from_bytes(data[:position], "little"), []
    for _ in range(count):
        packed, digit = divmod(packed, tables.num_experts)
        digits.append(digit)
    if packed:
        raise CorruptStreamError(f"tile: an expert beyond the {tables.num_experts}; send it again")
    experts_N = np.array(digits)
    latents, position = _section(data, position)
    latents = range_coder.decode(tables.latent_coder, latents, _latent_tables(tables, experts_N)) - MAX_LATENT
    scales_NC, means_NC = synthesise(tables, experts_N, latents.reshape(count, -1))
    escapes, position = _section(data, position)
    scales = scales_NC.reshape(-1)
    radii = tables.arrays["radius"][scales].astype(np.int64)
    residuals = range_coder.decode(tables.value_coder, data[position:], scales) - radii
    place = 0
    for index in np.flatnonzero(residuals > radii):
        coded, place = read_varint(escapes, place)
        residuals[index] = (radii[index] + 1 + coded // 2) * (-1 if coded % 2 else 1)
    if place < len(escapes) or np.abs(residuals).max() > MAX_RESIDUAL:
        raise CorruptStreamError("tile: its escapes are not those of its residuals; send it again")
    values_NC = means_NC + residuals.reshape(count, -1).astype(np.float32)
    return tables.arrays["offset"] + tables.arrays["step"][experts_N] * values_NC


def _decode_raw(data: bytes, count: int) -> np.ndarray:
    scales_N = np.frombuffer(data, "<f4", count)
    values_NC = np.frombuffer(data, np.int8, offset=4 * count).reshape(count, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        x_NC = scales_N[:, None] * values_NC.astype(np.float32)
    if not np.isfinite(x_NC).all():
        raise CorruptStreamError("tile: its values are not finite")
    return x_NC


def _section(data: bytes, position: int) -> tuple[bytes, int]:
    length, position = read_varint(data, position)
    if position + length > len(data):
        raise CorruptStreamError(f"tile: a section of {length} bytes does not fit; send it again")
    return data[position : position + length], position + length


def _check_limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise StreamLimitError(f"frame with {count} {what}: the limit is {limit}")
    if not count:
        raise CorruptStreamError(f"frame without {what}: send it again")

"""Frames: round trips, their price, and what a receiver makes of anything else.

A mutated frame either decodes to the original or raises a typed error. Where its checksums are mended, so that damage
reaches the decoder, it may decode to other features; nothing else may happen.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from stepjax.errors import (
    BitstreamError,
    CheckpointError,
    ConfigError,
    CorruptStreamError,
    StreamLimitError,
    UnknownModelError,
)
from stepjax.tofc import codec
from stepjax.tofc.codec import Limits, decode, encode, encode_raw, mended, parse, pieces
from stepjax.tofc.range_coder import varint
from stepjax.tofc.tables import Tables

DATA = Path(__file__).parent.parent / "data"
WIDE = Limits(features=4096)


@pytest.fixture(scope="module")
def frame(tables, sample_features):
    """Three tiles of unequal size."""
    x_NC = sample_features(21, seed=10)
    return encode(tables, [x_NC[:8], x_NC[8:9], x_NC[9:]])


@pytest.fixture(scope="module")
def decoded(tables, frame):
    return decode(tables, frame)


def test_costs_are_those_of_the_bytes(tables, sample_features):
    """Of features of which one has values that escape."""
    x_NC = sample_features(1152, seed=11)
    x_NC[3, 5:9] += 4000
    experts_N, bits_N = codec.costs(tables, x_NC)
    np.testing.assert_array_equal(experts_N, codec.analyse(tables, x_NC)[0])
    (payload,) = parse(encode(tables, [x_NC]), limits=WIDE).payloads
    assert abs(bits_N.sum() / 8 / len(payload) - 1) < 0.01
    assert bits_N[3] == bits_N.max() > 2 * np.median(bits_N)


def test_features_come_back_as_training_said(trained, tables, sample_features):
    """Their quantised values, from the model in JAX; with the bytes that it estimates, all overhead included."""
    x_NC = sample_features(1152, seed=11)  # as many values as a tile of 32 features and 1152 channels
    rate = jax.jit(lambda x: trained(x, hard=True))(x_NC)
    data = encode(tables, [x_NC])
    (found,) = decode(tables, data, limits=WIDE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rate.features_NC, rtol=1e-4, atol=1e-4)
    estimate = float(rate.bits_N.sum()) / 8
    assert 3000 < estimate < len(data) < 1.01 * estimate


def test_what_is_decoded_is_what_was_coded(tables, frame, decoded, sample_features):
    """To the bit: offset + step * (mean + residual), in float32, from the integers that were coded."""
    x_NC = sample_features(21, seed=10)
    experts, latents, _, residuals = codec.analyse(tables, x_NC)
    means = codec.synthesise(tables, experts, latents)[1]
    values = tables.arrays["offset"] + tables.arrays["step"][experts] * (means + residuals.astype(np.float32))
    np.testing.assert_array_equal(np.concatenate(decoded), values)
    assert [len(tile) for tile in decoded] == [8, 1, 12] == list(parse(frame).features)
    assert np.abs(values - x_NC).max() <= 0.51 * tables.arrays["step"].max()


def test_the_header_is_a_few_bytes(tables, frame):
    payloads = parse(frame).payloads
    assert len(frame) - sum(map(len, payloads)) == 1 + 4 + 1 + 1 + sum(1 + len(varint(len(p))) + 4 for p in payloads)


def test_a_tiles_bytes_do_not_depend_on_its_batch(tables, sample_features):
    x_TNC = sample_features(16 * 32, seed=12).reshape(16, 32, -1)
    together = parse(encode(tables, x_TNC)).payloads
    assert together == tuple(parse(encode(tables, [tile])).payloads[0] for tile in x_TNC)


def test_features_far_from_all_others_are_coded_too(tables, sample_features):
    x_NC = sample_features(16, seed=13)
    x_NC[3] += 1000.0
    x_NC[5, 7] = -1e5
    (found,) = decode(tables, encode(tables, [x_NC]))
    np.testing.assert_allclose(found, x_NC, atol=0.51 * tables.arrays["step"].max(), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -3e38])
def test_values_that_cannot_be_coded_are_refused(tables, sample_features, value):
    x_NC = sample_features(4)
    x_NC[2, 3] = value
    with pytest.raises(BitstreamError, match="not finite" if not np.isfinite(value) else "channel 3="):
        encode(tables, [x_NC])


@pytest.mark.parametrize("shape", [(4, 31), (0, 32), (32,)], ids=str)
def test_tiles_of_another_shape_are_refused(tables, shape):
    with pytest.raises(BitstreamError, match=r"tiles\[1\]: its shape is"):
        encode(tables, [np.zeros((4, 32)), np.zeros(shape)])
    with pytest.raises(BitstreamError, match="at least one"):
        encode(tables, [])


def test_tables_are_loaded_as_they_were_saved(tmp_path, tables, frame, decoded):
    tables.save(tmp_path / "tables.safetensors")
    loaded = Tables.load(tmp_path / "tables.safetensors")
    assert loaded.sha256 == tables.sha256 and frame[1:5].hex() == loaded.id
    for ours, theirs in zip(decode(loaded, frame), decoded, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_identity_covers_every_array_and_the_origin(tables):
    seen = {tables.sha256, Tables(tables.arrays, "another encoder").sha256}
    for name, array in tables.arrays.items():
        if name in ("latent_frequencies", "value_frequencies"):
            changed = np.array(array)
            first, second = changed.reshape(-1)[:2]
            changed.reshape(-1)[:2] = first + second - 1, 1
        elif name in ("radius",):
            continue  # goes with the frequencies
        else:
            changed = np.array(array)
            changed.reshape(-1)[0] += 1
        seen.add(Tables({**tables.arrays, name: changed}).sha256)
    assert len(seen) == 1 + len(tables.arrays)


def test_damaged_tables_are_refused(tmp_path, tables):
    path = tmp_path / "tables.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tables.load(path)
    arrays = {**tables.arrays, "offset": tables.arrays["offset"] + 1}
    save_file(arrays, path, {"format": "1", "origin": "", "sha256": tables.sha256})
    with pytest.raises(CheckpointError, match="SHA-256"):
        Tables.load(path)
    save_file(arrays, path, {"format": "0"})
    with pytest.raises(CheckpointError, match="format 0, not 1"):
        Tables.load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tables.load(path)
    for name, array, words in (
        ("step", -tables.arrays["step"], "step is not finite, or not positive"),
        ("router_bias1", tables.arrays["router_bias1"].astype(np.int64), "router_bias1 is int64"),
        ("synthesis_shifts", np.array([0, 5], np.int32), "synthesis_shifts"),
        ("value_frequencies", tables.arrays["value_frequencies"] + np.uint16(1), "add up"),
        ("extra", np.zeros(3), "extra"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Tables({**tables.arrays, name: array})
    with pytest.raises(CheckpointError, match="offset"):
        Tables({name: array for name, array in tables.arrays.items() if name != "offset"})


# Mutations.


def outcome(tables, data, decoded):
    """Whether a frame decodes to the original; False if it raises a typed error; anything else fails the test."""
    try:
        found = decode(tables, data)
    except BitstreamError as error:
        assert str(error)
        return False
    assert len(found) == len(decoded)
    for ours, theirs in zip(found, decoded, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return True


def test_every_truncation_is_refused(tables, frame):
    for end in range(len(frame)):
        with pytest.raises(CorruptStreamError):
            decode(tables, frame[:end])
    with pytest.raises(CorruptStreamError):
        decode(tables, frame + b"\0")


def test_every_flipped_bit_is_refused(tables, frame):
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            decode(tables, bytes(damaged))


def test_spliced_and_shuffled_frames_are_refused(tables, frame, decoded, sample_features):
    """Also at the borders of tiles, between frames whose headers are equal."""
    rng = np.random.default_rng(14)
    x_NC = sample_features(21, seed=10)
    same = [x_NC[:8], x_NC[9:]]
    others = [encode(tables, [x_NC[9:17], x_NC[:12]]), encode(tables, same), encode(tables, same[::-1]), frame]
    accepted = 0
    for _ in range(3000):
        data, other = bytearray(frame), others[rng.integers(len(others))]
        match rng.integers(5):
            case 0:  # the end of another
                data[rng.integers(len(data)) :] = other[rng.integers(len(other)) :]
            case 1:  # a stretch of another, in place
                start, length = rng.integers(len(data)), rng.integers(1, 60)
                data[start : start + length] = other[start : start + length]
            case 2:  # a stretch twice, or missing
                start, length = rng.integers(len(data)), rng.integers(1, 20)
                data[start : start + length] = bytes(data[start : start + length]) * int(rng.integers(0, 3))
            case 3:  # noise
                start, length = rng.integers(len(data)), rng.integers(1, 20)
                data[start : start + length] = rng.bytes(length)
            case 4:  # nothing but noise
                data = bytearray([frame[0], *rng.bytes(rng.integers(0, 60))])
        accepted += outcome(tables, bytes(data), decoded)
    assert accepted < 1500  # those that changed nothing


def test_a_tile_of_another_frame_does_not_fit(tables, sample_features):
    """Equal headers, if tiles happen to have equal lengths, and whole tiles with their checksums."""
    x_NC = sample_features(400, seed=15).reshape(100, 4, -1)
    frames = {}
    for tile in x_NC:
        data = encode(tables, [tile, x_NC[0]])
        frames.setdefault(data[:11], []).append(data)
    one, other = next(same for same in frames.values() if len(same) > 1)[:2]
    length = len(parse(one).payloads[0]) + 4
    with pytest.raises(CorruptStreamError, match=r"tiles \[1\]: checksums"):
        decode(tables, one[:11] + other[11 : 11 + length] + one[11 + length :])


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


@pytest.mark.parametrize("damaged", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_every_damaged_tile_is_named_and_sent_again_alone(frame, damaged):
    parts = pieces(frame)
    assert b"".join(parts) == frame
    # The first byte of a payload; the first piece begins with the header.
    start = len(parts[0]) - len(parse(frame).payloads[0]) - 4
    data = b"".join(flipped(part, 0 if tile else start) if tile in damaged else part for tile, part in enumerate(parts))
    with pytest.raises(CorruptStreamError) as refused:
        parse(data)
    assert refused.value.tiles == damaged
    assert mended(data, damaged, b"".join(parts[tile] for tile in damaged)) == frame


def test_a_damaged_checksum_makes_two_tiles_suspect(frame):
    """Its own, and the one that continues it."""
    parts = pieces(frame)
    data = flipped(frame, len(parts[0]) - 1)
    with pytest.raises(CorruptStreamError) as refused:
        parse(data)
    assert refused.value.tiles == (0, 1) and mended(data, [0, 1], parts[0] + parts[1]) == frame


def test_a_damaged_header_is_sent_again_with_the_first_tile_or_with_all(frame):
    """Its checksum is the first tile's; where the damage is in a length, nothing fits."""
    header, mends = len(pieces(frame)[0]) - len(parse(frame).payloads[0]) - 4, 0
    for place in range(header):
        data = flipped(frame, place)
        with pytest.raises((CorruptStreamError, StreamLimitError, UnknownModelError)) as refused:
            parse(data)
        if isinstance(refused.value, CorruptStreamError) and refused.value.tiles:
            assert refused.value.tiles == (0,) and mended(data, [0], pieces(frame)[0]) == frame
            mends += 1
    assert mends >= 5  # the model's bytes and columns
    # Two lengths are damaged, and their sum is not.
    data = bytearray(frame)
    data[8] += 1
    data[10] -= 1
    assert len(pieces(bytes(data))) == 3
    with pytest.raises(CorruptStreamError, match="send it whole"):
        mended(bytes(data), [1], pieces(frame)[1])


def test_pieces_that_do_not_fit_are_refused(tables, frame, sample_features):
    parts = pieces(frame)
    for tiles, sent in (
        ([], b""),
        ([3], parts[2]),
        ([-1], parts[2]),
        ([2**63], parts[2]),
        ([1, 1], parts[1] * 2),
        ([1, 0], parts[1] + parts[0]),
        ([1], parts[1][:-1]),
        ([1], parts[1] + b"\0"),
        ([0, 1, 2, 3], frame),
    ):
        with pytest.raises(CorruptStreamError, match="send it whole"):
            mended(frame, tiles, sent)
    with pytest.raises(CorruptStreamError) as refused:
        parse(mended(frame, [1], flipped(parts[1], 2)))
    assert refused.value.tiles == (1,)
    with pytest.raises(StreamLimitError):
        pieces(frame, limits=Limits(tiles=2))


def test_an_unknown_model_is_named_with_those_that_are_known(tables, frame):
    other = Tables(tables.arrays, "another encoder")
    with pytest.raises(UnknownModelError, match=tables.id) as error:
        decode(other, frame)
    assert error.value.accepted == (other.id,)
    assert len(decode([other, tables], frame)) == 3
    with pytest.raises(UnknownModelError, match="version 2"):
        decode(tables, bytes([0xF2]) + frame[1:])


def test_limits_are_the_receivers(tables, frame):
    for limits, words in (
        (Limits(frame_bytes=len(frame) - 1), f"the limit is {len(frame) - 1}"),
        (Limits(tiles=2), "3 tiles: the limit is 2"),
        (Limits(features=11), "12 features of a tile: the limit is 11"),
    ):
        with pytest.raises(StreamLimitError, match=words):
            decode(tables, frame, limits=limits)
    with pytest.raises(ConfigError, match="limits.tiles=0"):
        Limits(tiles=0)


def sealed(model, tiles, count=None):
    """A frame with right checksums around any payloads; tiles are pairs of the features said and the payload."""
    lengths = b"".join(varint(features) + varint(len(payload)) for features, payload in tiles)
    header = bytes([0xF1]) + bytes.fromhex(model) + varint(len(tiles) if count is None else count) + b"\0" + lengths
    frame, crc = header, zlib.crc32(header)
    for _, payload in tiles:
        crc = zlib.crc32(payload, crc)
        frame += payload + crc.to_bytes(4, "little")
    return frame


def test_hostile_payloads_under_right_checksums(tables, frame):
    """They may decode to features, of the number that the header says, and within the limits of time and memory."""
    rng, refused, began = np.random.default_rng(16), 0, time.process_time()
    whole = parse(frame)
    for _ in range(600):
        tile = int(rng.integers(3))
        payload, features = bytearray(whole.payloads[tile]), whole.features[tile]
        match rng.integers(4):
            case 0:
                payload[rng.integers(len(payload))] ^= 1 << rng.integers(8)
            case 1:
                del payload[rng.integers(len(payload)) :]
            case 2:
                features = int(rng.integers(1, 65))
            case 3:
                payload = bytearray(rng.bytes(rng.integers(0, 300)))
        try:
            (found,) = decode(tables, sealed(tables.id, [(features, bytes(payload))]))
            assert found.shape == (features, tables.channels) and np.isfinite(found).all()
        except CorruptStreamError:
            refused += 1
    assert refused > 400
    assert time.process_time() - began < 60  # 100 ms each: a bound for hangs


def test_hostile_lengths_allocate_next_to_nothing(tables):
    lane_bomb = varint(4096) + varint(4096)
    payload = b"\0" * 16
    hostile = [
        sealed(tables.id, [(64, payload)] * 129),
        sealed(tables.id, [(65, payload)]),
        sealed(tables.id, [(0, payload)]),
        sealed(tables.id, [], 0),
        sealed(tables.id, [], (1 << 28) - 1),
        sealed(tables.id, [((1 << 28) - 1, payload)]),
        *(sealed(tables.id, [(64, payload + varint(length) + lane_bomb)]) for length in (0, 1, 4, (1 << 28) - 1)),
        sealed(tables.id, [(64, payload + varint(2) + b"\0\1" + varint(0) + lane_bomb)]),
        sealed(tables.id, [(64, payload + varint(1020) + b"\0" + b"\xff" * 1019)]),
        bytes([0xF1]) + bytes.fromhex(tables.id) + b"\xff" * 100,
        b"\xf1" * (1 << 20),
    ]
    began = time.process_time()
    tracemalloc.start()
    for data in hostile:
        with pytest.raises(BitstreamError):
            decode(tables, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 and time.process_time() - began < 30


# Elsewhere.


def test_no_jax_is_needed():
    code = "import sys; import stepjax.tofc.codec; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def recorded():
    """Tables and a frame that were made once, by JAX 0.10.2 and NumPy 2.4.6 on an x86 CPU."""
    record = json.loads((DATA / "tofc_frame.json").read_text())
    return Tables.load(DATA / "tofc_tables.safetensors"), bytes.fromhex(record["frame"]), record["sha256"]


def digest(tiles):
    return hashlib.sha256(b"".join(tile.astype("<f4").tobytes() for tile in tiles)).hexdigest()


def test_a_recorded_frame_decodes_to_the_bit():
    """On every machine, and with every later version."""
    tables, frame, expected = recorded()
    assert digest(decode(tables, frame)) == expected


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("core", ["Prescott", "Nehalem", "Haswell"])
def test_other_matrix_kernels_give_the_same_bytes(tables, sample_features, tmp_path, core):
    """OpenBLAS has some for each processor, which add up in other orders; other libraries ignore the variable."""
    tables.save(tmp_path / "tables.safetensors")
    x_NC = sample_features(64, seed=17)
    save_file({"x": x_NC}, tmp_path / "x.safetensors")
    code = (
        "import sys; from safetensors.numpy import load_file; from stepjax.tofc.codec import encode\n"
        "from stepjax.tofc.tables import Tables\n"
        "x = load_file(sys.argv[2])['x']; print(encode(Tables.load(sys.argv[1]), [x[:40], x[40:]]).hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tables.safetensors"), str(tmp_path / "x.safetensors")]
    env = {**os.environ, "OPENBLAS_CORETYPE": core}
    found = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120).stdout
    assert bytes.fromhex(found) == encode(tables, [x_NC[:40], x_NC[40:]])


def test_raw_features_come_back_within_half_a_step(tables, sample_features):
    x_NC = sample_features(21, seed=14)
    x_NC[4] = 0
    tiles = [x_NC[:8], x_NC[8:9], x_NC[9:]]
    frame = encode_raw(tables, tiles, columns=2)
    assert parse(frame).columns == 2 and len(frame) < 21 * (32 + 4) + 40
    found = np.concatenate(decode(tables, frame))
    assert found.dtype == np.float32 and not found[4].any()
    assert (np.abs(found - x_NC) <= np.abs(x_NC).max(axis=1, keepdims=True) / 253).all()
    newer = Tables({**tables.arrays, "step": 2 * tables.arrays["step"]}, tables.origin)
    np.testing.assert_array_equal(np.concatenate(decode(newer, frame)), found)
    for model, kind in ((Tables(tables.arrays, "another"), frame), (newer, encode(tables, tiles))):
        with pytest.raises(UnknownModelError) as refused:
            decode(model, kind)
        assert refused.value.accepted == ((model.features_id if kind is frame else model.id),)


def test_a_damaged_raw_frame_is_a_typed_error_with_its_tile(tables, sample_features):
    frame = encode_raw(tables, sample_features(6, seed=15).reshape(2, 3, -1))
    for end in range(len(frame)):
        with pytest.raises(CorruptStreamError):
            decode(tables, frame[:end])
    for place in range(len(frame)):
        data = frame[:place] + bytes([frame[place] ^ 1]) + frame[place + 1 :]
        with pytest.raises((CorruptStreamError, StreamLimitError, UnknownModelError)) as refused:
            decode(tables, data)
        if place >= len(frame) - 4:
            assert isinstance(refused.value, CorruptStreamError) and refused.value.tiles == (1,)
    for payload, words in (
        (bytes(3 * 36 - 1), "107 bytes of 3 raw features"),
        (b"\xff\xff\xff\x7f" + bytes([1]) * 104, "not finite"),
    ):
        data = bytearray(sealed(tables.features_id, [(3, payload)]))
        data[0] |= codec.RAW
        header = data[: len(data) - len(payload) - 4]
        data[-4:] = zlib.crc32(payload, zlib.crc32(header)).to_bytes(4, "little")
        with pytest.raises(CorruptStreamError, match=f"tile 0: .*{words}") as refused:
            decode(tables, bytes(data))
        assert refused.value.tiles == (0,)
    with pytest.raises(BitstreamError, match="not finite"):
        encode_raw(tables, [np.full((2, 32), np.inf)])

"""Every kind of image that a record may hold, made in memory: the right pixels, or an ImageError that names it."""

import base64
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from stepjax.errors import ImageError
from stepjax.processing import image_files
from stepjax.processing.image_files import open_image


def colours(width=12, height=8):
    """A picture whose every pixel differs."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8))


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height, *chunks):
    """The bytes of a PNG file of 8-bit RGB with the given further chunks; its pixels need not exist."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def pixels(image):
    return np.asarray(image).tolist()


def assert_is(image, expected):
    assert image.mode == "RGB" and image.size == expected.size
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


# Sources -------------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_picture(tmp_path):
    data = encode(colours(), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 60] for i in range(0, len(text), 60))
    escaped = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    sources = [colours(), path, str(path), data, bytearray(data), memoryview(data), np.asarray(colours())]
    sources += [f"data:image/png;base64,{payload}" for payload in (text, wrapped, escaped)]
    for source in sources:
        assert_is(open_image(source), colours())


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "JPEG2000"])
def test_lossless_formats_are_read_exactly(format):
    assert_is(open_image(encode(colours(16, 16), format)), colours(16, 16))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_are_read_closely(format):
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    opened = open_image(encode(image, format))
    assert opened.mode == "RGB" and opened.size == (16, 16)
    assert np.abs(np.asarray(opened, int) - np.asarray(image, int)).max() <= 6


def test_what_is_already_right_is_not_copied():
    image = colours()
    assert open_image(image) is image


def test_opening_twice_changes_nothing():
    for source in [encode(colours(), "GIF"), encode(colours(), "PNG"), colours().convert("CMYK"), animation("GIF")]:
        once = open_image(source, frame=0)
        assert_is(open_image(once), once)


def test_the_picture_outlives_its_file(tmp_path):
    path = tmp_path / "picture.png"
    colours().save(path)
    image = open_image(path)
    path.unlink()
    assert_is(image.rotate(0), colours())


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.array([[7, 9]], np.uint8), [[[7, 7, 7], [9, 9, 9]]]),
        (np.array([[[7], [9]]], np.uint8), [[[7, 7, 7], [9, 9, 9]]]),
        (np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), [[[1, 2, 3], [4, 5, 6]]]),
        (np.array([[[1, 2, 3, 255], [4, 5, 6, 0]]], np.uint8), [[[1, 2, 3], [255, 255, 255]]]),
    ],
    ids=["HW", "HW1", "HW3", "HW4"],
)
def test_arrays(array, expected):
    assert pixels(open_image(array)) == expected


def test_arrays_need_not_be_contiguous():
    array = np.asarray(colours())[::-1, ::2]
    np.testing.assert_array_equal(np.asarray(open_image(array)), array)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 4, 3), np.float32), "float32; convert it to uint8"),
        (np.zeros((4, 4), bool), "array of bool"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"shape \(3, 4, 4, 3\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"empty array of shape \(0, 4, 3\)"),
    ],
)
def test_refuses_other_arrays(array, message):
    with pytest.raises(ImageError, match=f"^image 3: .*{message}"):
        open_image(array, name="image 3")


@pytest.mark.parametrize("source", [None, 3, {"bytes": b""}, io.BytesIO(b"x")])
def test_refuses_other_types(source):
    with pytest.raises(ImageError, match=f"a {type(source).__name__} is not an image"):
        open_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://host/a.png", "https://host/a.png", "HTTPS://host/a.png", "s3://bucket/a.png"])
def test_fetches_nothing(url):
    with pytest.raises(ImageError, match=f"{url} is a URL, which is not fetched"):
        open_image(url)


@pytest.mark.parametrize(
    "uri, message",
    [
        ("data:image/png;base64,@@@@", "base64 text is broken"),
        ("data:image/png;base64,abcde", "base64 text is broken"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:text/plain;base64,YWJj", "not an image data URI"),
        ("data:image/png", "not an image data URI"),
        ("data:image/png;base64,YWJj", "not an image in a known format"),
    ],
)
def test_refuses_broken_data_uris(uri, message):
    with pytest.raises(ImageError, match=message):
        open_image(uri)


# Orientation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, format):
    """Expected pixels by numpy: 5 to 8 swap the axes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored_HWC = np.asarray(colours())
    turned = stored_HWC.transpose(1, 0, 2) if orientation >= 5 else stored_HWC
    rows, columns = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
        orientation
    ]
    image = open_image(encode(colours(), format, exif=exif))
    np.testing.assert_array_equal(np.asarray(image), turned[::rows, ::columns])
    assert_is(open_image(image), image)


def test_orientation_of_a_pil_image_leaves_the_callers_image_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(colours(), "PNG", exif=exif)))
    assert_is(open_image(image), ImageOps.exif_transpose(image))
    assert image.size == (12, 8)


@pytest.mark.parametrize("exif", [b"garbage", b"II*\x00\xff\xff\xff\xff", b"II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_garbled_exif_states_no_orientation(exif):
    data = encode(colours(), "JPEG", exif=b"Exif\x00\x00" + exif, quality=95)
    assert open_image(data).size == (12, 8)


SIDEWAYS = (0x0112, 3, 1, 6)
ENTRIES = {  # tag, type, count, value or offset
    "alone": [SIDEWAYS],
    "as a long": [(0x0112, 4, 1, 6)],
    "after a text beyond the end": [(0x010F, 2, 1000, 10**6), SIDEWAYS],
    "after an endless text": [(0x010F, 2, 2**31, 0), SIDEWAYS],
    "after an unknown type": [(0x010F, 99, 1, 0), SIDEWAYS],
    "before a text that is a number": [SIDEWAYS, (0x0110, 12, 1, 8)],
    "before a number that is bytes": [SIDEWAYS, (0x011B, 1, 5, 0)],
    "before a list that is one": [SIDEWAYS, (0x0128, 4, 3, 10)],
    "before directories beyond the end": [SIDEWAYS, (0x8769, 4, 1, 10**6), (0x8825, 5, 10**6, 8)],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_orientation_is_taken_by_its_value_alone(entries, format, order):
    body = b"".join(
        struct.pack(order + "HHI", *entry[:3]) + struct.pack(order + ("I" if entry[1] != 3 else "HH"), *value)
        for entry in entries
        for value in [(entry[3],) if entry[1] != 3 else (entry[3], 0)]
    )
    head = (b"II*\x00" if order == "<" else b"MM\x00*") + struct.pack(order + "IH", 8, len(entries))
    data = encode(colours(), format, exif=b"Exif\x00\x00" + head + body + bytes(4))
    assert open_image(data).size == (8, 12)


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV"])
@pytest.mark.parametrize("encoded", [False, True])
def test_other_colour_spaces(mode, encoded):
    image = Image.new("RGB", (6, 6), (200, 100, 50)).convert(mode)
    opened = open_image(encode(image, "TIFF")) if encoded and mode != "HSV" else open_image(image)
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened, int) - (200, 100, 50)).max() <= 3


def test_cmyk_jpeg():
    image = Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK")
    assert np.abs(np.asarray(open_image(encode(image, "JPEG")), int) - (200, 100, 50)).max() <= 4


def test_one_bit():
    assert pixels(open_image(encode(Image.fromarray(np.array([[True, False]])), "PNG"))) == [[[255] * 3, [0] * 3]]


def palette_image():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


def test_palette():
    assert pixels(open_image(encode(palette_image(), "PNG"))) == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("transparency, expected", [(1, [255, 255, 255]), (b"\xff\x80", [147, 152, 157])])
def test_palette_with_transparency(transparency, expected):
    """One transparent entry, or an alpha an entry: (40, 50, 60) at 128 / 255 on white."""
    data = encode(palette_image(), "PNG", transparency=transparency)
    assert pixels(open_image(data)) == [[[10, 20, 30], expected]]


def test_transparent_gif():
    data = encode(palette_image(), "GIF", transparency=0)
    assert pixels(open_image(data)) == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparency_is_composited_on_white(mode):
    """Black under alpha 0, 128 and 255: white, grey and black. Dropping alpha would give black three times."""
    image = Image.fromarray(np.array([[[0, 0, 0, alpha] for alpha in (0, 128, 255)]], np.uint8))
    if mode in ("LA", "La"):
        image = image.convert("LA")
    image = image.convert(mode) if mode != "PA" else palette_with_alpha()
    assert pixels(open_image(image)) == [[[255] * 3, [127] * 3, [0] * 3]]


def palette_with_alpha():
    image = Image.new("PA", (3, 1))
    image.putpalette([0, 0, 0])
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (0, alpha))
    return image


def test_transparent_colour_of_an_rgb_png():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(open_image(encode(image, "PNG", transparency=(4, 5, 6)))) == [[[1, 2, 3], [255, 255, 255]]]


LEVELS = np.array([[0, 128, 129, 257, 32896, 65407, 65535]])
SCALED = [[0, 0, 1, 1, 128, 255, 255]]  # value / 257, to the nearest; clipping would give 128, 129 and then 255


@pytest.mark.parametrize("format, dtype", [("PNG", "u2"), ("TIFF", "u2"), ("TIFF", "i4"), ("JPEG2000", "u2")])
def test_16_bit_files_are_scaled_not_clipped(format, dtype):
    image = open_image(encode(Image.fromarray(LEVELS.astype(dtype)), format))
    assert np.asarray(image)[..., 0].tolist() == SCALED and image.mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_16_bit_modes_are_scaled_not_clipped(mode):
    image = Image.new(mode, (7, 1))
    for x, value in enumerate(LEVELS[0].tolist()):
        image.putpixel((x, 0), value)
    assert np.asarray(open_image(image))[..., 0].tolist() == SCALED


def test_transparent_level_of_a_16_bit_png():
    data = encode(Image.fromarray(np.array([[256, 257]], np.uint16)), "PNG", transparency=256)
    assert pixels(open_image(data)) == [[[255] * 3, [1] * 3]]


@pytest.mark.parametrize(
    "values, expected",
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 0.5, 200.6], [0, 0, 201]), ([0.0, 1.0, 255.0], [0, 1, 255])],
)
def test_floats_are_0_to_1_or_0_to_255(values, expected):
    data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert np.asarray(open_image(data))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [[-0.1, 0.5], [0.0, 255.5], [0.0, np.nan], [0.0, np.inf]])
def test_refuses_floats_of_unknown_scale(values):
    with pytest.raises(ImageError, match="^scan 7: float pixels from .* to .*rescale"):
        open_image(Image.fromarray(np.array([values], np.float32)), name="scan 7")


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_refuses_integers_beyond_16_bits(values):
    with pytest.raises(ImageError, match=f"^scan 7: integer pixels from {values[0]} to {values[1]}; rescale"):
        open_image(Image.fromarray(np.array([values], np.int32)), name="scan 7")


# Frames --------------------------------------------------------------------------------------------------------------

FRAMES = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]


def animation(format, **options):
    return encode(FRAMES[0], format, save_all=True, append_images=FRAMES[1:], **options)


@pytest.mark.parametrize("format, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_several_frames_are_refused_unless_one_is_chosen(format, options):
    data = animation(format, **options)
    with pytest.raises(ImageError, match='^clip 2: it has several frames or pages; add "frame": 0 to the image'):
        open_image(data, name="clip 2")
    for index, expected in enumerate(FRAMES):
        assert_is(open_image(data, frame=index), expected)
    for index in (3, -1):
        with pytest.raises(ImageError, match=f"^clip 2: there is no frame {index}; they are numbered from 0"):
            open_image(data, name="clip 2", frame=index)


def test_choosing_a_frame_leaves_the_callers_image_where_it_was():
    image = Image.open(io.BytesIO(animation("GIF")))
    image.seek(1)
    assert_is(open_image(image, frame=2), FRAMES[2])
    assert image.tell() == 1


def test_a_still_image_has_frame_0_only():
    assert_is(open_image(colours(), frame=0), colours())
    with pytest.raises(ImageError, match="there is no frame 1"):
        open_image(encode(colours(), "PNG"), frame=1)


def test_the_photograph_of_a_multi_picture_file_is_its_first():
    image = open_image(animation("MPO", quality=95))
    assert np.abs(np.asarray(image, int) - (255, 0, 0)).max() <= 4


# Metadata ------------------------------------------------------------------------------------------------------------


def with_chunk(data, kind, body, *, checksum=None, at=33):
    """A PNG file with a further chunk, by default the second."""
    check = zlib.crc32(kind + body) if checksum is None else checksum
    return data[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check) + data[at:]


LONG = zlib.compress(bytes(2**21))
CHUNKS = {
    "a long text": (b"zTXt", b"Comment\x00\x00" + LONG),
    "a long international text": (b"iTXt", b"workflow\x00\x01\x00\x00\x00" + LONG),
    "a long profile": (b"iCCP", b"x\x00\x00" + LONG),
    "no profile": (b"iCCP", b"x"),
    "a text in no known coding": (b"zTXt", b"x\x00\x01abc"),
    "half a size": (b"pHYs", b"ab"),
    "half a gamma": (b"gAMA", b"a"),
    "half of the primaries": (b"cHRM", b"abc"),
    "no intent": (b"sRGB", b""),
}


@pytest.mark.parametrize("at", [33, -12], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_a_png_is_as_good_as_its_pixels(chunk, at, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(colours(), "PNG", exif=exif)
    data = with_chunk(data, *chunk, at=at if at > 0 else len(data) + at)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert_is(open_image(source), colours().rotate(180))


def test_further_flaws_of_metadata():
    data = encode(colours(), "PNG")
    assert_is(open_image(with_chunk(data, b"tEXt", b"a\x00b", checksum=0)), colours())
    text = b"x\x00\x00" + zlib.compress(bytes(900_000))
    for _ in range(80):  # more than PIL takes of texts
        data = with_chunk(data, b"zTXt", text)
    assert_is(open_image(data), colours())
    data = encode(palette_image(), "PNG", transparency=0)
    assert pixels(open_image(with_chunk(data, *CHUNKS["a long profile"]))) == [[[255] * 3, [40, 50, 60]]]


def test_critical_chunks_are_no_metadata():
    with pytest.raises(ImageError, match="tRNS"):
        open_image(with_chunk(encode(colours(), "PNG"), b"tRNS", b"x"))


# Broken files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("from_path", [False, True])
def test_refuses_truncated_files_by_name(format, from_path, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    path = tmp_path / "half a picture"
    for kept in (0.99 if format == "JPEG" else 0.9, 0.5, 0.02):
        path.write_bytes(data[: int(len(data) * kept)])
        source, name = (
            (path, "half a picture") if from_path else (path.read_bytes(), f"image of {int(len(data) * kept)} bytes")
        )
        with pytest.raises(ImageError, match=name):
            open_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
def test_damaged_bytes_give_a_picture_or_an_image_error(format):
    """Whatever PIL's decoders raise, callers need to catch ImageError only."""
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(colours(32, 32), format), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
        try:
            assert open_image(damaged.tobytes()).mode == "RGB"
        except ImageError as error:
            assert str(error).startswith(f"image of {len(data)} bytes: ")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side, limit", [(10_000, image_files.MAX_PIXELS), (40_000, "exceeds limit")])
def test_refuses_decompression_bombs_before_decoding(side, limit):
    """By our limit, and where PIL's comes first, by that. The file is a header only: decoding would fail otherwise."""
    with pytest.raises(ImageError, match=f"^poster 1: .*pixels.*{limit}.*; scale it down first"):
        open_image(png(side, side, (b"IDAT", b"")), name="poster 1")


def test_the_pixel_limit_is_the_module_constant(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 12 * 8)
    assert_is(open_image(encode(colours(), "PNG")), colours())
    monkeypatch.setattr(image_files, "MAX_PIXELS", 12 * 8 - 1)
    for source in [encode(colours(), "PNG"), colours(), np.asarray(colours())]:
        with pytest.raises(ImageError, match="page 4: 12x8 pixels are more than the limit of 95"):
            open_image(source, name="page 4")


def test_large_pages_behind_small_ones_are_refused_too(monkeypatch):
    pages = encode(Image.new("L", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("L", (20, 20))])
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100)
    assert open_image(pages, frame=0).size == (4, 4)
    with pytest.raises(ImageError, match="20x20 pixels are more than the limit of 100"):
        open_image(pages, frame=1)


@pytest.mark.parametrize("source", [Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), png(0, 5), b""])
def test_refuses_empty_images(source):
    with pytest.raises(ImageError, match="^image 0: "):
        open_image(source, name="image 0")


ICON = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, 57, 22) + png(9000, 9000)  # of another size


@pytest.mark.parametrize(
    "data",
    [
        *(b"hello, world", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ICON),
        *(b"P3\n5000 5000\n255\n" + b"0 " * 1000, b"qoif" + struct.pack(">IIBB", 5000, 5000, 3, 0) + bytes(100)),
    ],
)
def test_refuses_unknown_formats(data):
    """PostScript counts as unknown: PIL would run an interpreter on it."""
    with pytest.raises(ImageError, match="^image 0: not an image in a known format.*JPEG, PNG"):
        open_image(data, name="image 0")


def test_refuses_missing_files_and_folders(tmp_path):
    missing = tmp_path / "missing.png"
    with pytest.raises(ImageError, match="missing.png: no such file"):
        open_image(missing)
    with pytest.raises(ImageError, match="^image 5: no such file; correct the path .*missing.png"):
        open_image(str(missing), name="image 5")
    with pytest.raises(ImageError, match=f"{tmp_path.name}: cannot be read .*directory"):
        open_image(tmp_path)


def test_messages_stay_short_when_a_payload_is_taken_for_a_path():
    for source in ["A" * 100_000, "word " * 20_000, "with a null \0 byte"]:
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert len(str(caught.value)) < 700


def tiff(*, pages=1, side=4, tile=None, rows=None):
    """The bytes of a TIFF of 8-bit grey, each page with a directory and pixels of its own."""
    file = bytearray(b"II*\x00" + struct.pack("<I", 8))
    pixels = zlib.compress(bytes(side * side))
    for page in range(pages):
        tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1}
        tags |= {322: tile, 323: tile, 325: len(pixels)} if tile else {278: rows or side, 279: len(pixels)}
        start = len(file) + 2 + 12 * (len(tags) + 1) + 4
        tags[324 if tile else 273] = start
        file += struct.pack("<H", len(tags))
        file += b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
        file += struct.pack("<I", start + len(pixels) if page + 1 < pages else 0) + pixels
    return bytes(file)


def test_pages_are_not_counted():
    data = tiff(pages=60_000)
    begin = time.process_time()
    with pytest.raises(ImageError, match="it has several frames or pages"):
        open_image(data)
    assert open_image(data, frame=3).size == (4, 4)
    assert time.process_time() - begin < 1


def test_tiles_may_be_larger_than_the_picture():
    assert open_image(tiff(tile=16, side=16)).size == (16, 16)
    with pytest.raises(ImageError, match="cannot be read"):  # it has too few pixels, which is not told before
        open_image(tiff(tile=2048))


@pytest.mark.parametrize("tile", [2064, 32768, 2**32 - 16])
def test_tiles_are_not_much_larger_than_the_picture(tile):
    """PIL takes memory for a whole one, a gibibyte for the second of these files of 150 bytes."""
    with pytest.raises(ImageError, match=f"4x4 pixels in tiles of {tile}x{tile}; save it with smaller ones"):
        open_image(tiff(tile=tile))


def test_rows_of_a_strip_are_not_believed():
    assert open_image(tiff(rows=2**31 - 1)).size == (4, 4)

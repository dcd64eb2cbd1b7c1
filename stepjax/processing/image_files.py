"""Reads any image of a record into one upright RGB picture, or raises an `ImageError` that names it.

Three defaults of PIL silently hurt training sets. Here, transparency is composited on white, greyscale deeper than 8
bits is scaled instead of clipped, and animations are refused instead of reduced to their first frame. PIL also refuses
files with broken metadata; here only the pixels must be intact.
"""

import base64
import contextlib
import io
import os
import re
import struct
import textwrap
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from stepjax.errors import ImageError, ImageSizeError

ImageSource = Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray

# Checked against the header, before decoding. Same as PIL's threshold: a quarter of a gibibyte of 24-bit colour.
MAX_PIXELS = 89_478_485

# Formats whose header states the picture's size. Icons' headers do not; PIL decodes PPM and QOI in Python, and runs
# other programs for EPS and WMF. JPEG covers the multi-picture files (MPO) of cameras and phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF")

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_MAX_TILE_PIXELS = 2**22  # limit for a TIFF tile larger than the picture; 256 x 256 is usual

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WHITE = (255, 255, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_Result = TypeVar("_Result")


def open_image(source: ImageSource, *, name: str | None = None, frame: int | None = None) -> Image.Image:
    """Reads one picture: decoded, upright, mode RGB.

    Args:
      source: a PIL image, a path, the bytes of a file, a `data:image/...` URI, or a uint8 array [H, W], [H, W, 1],
        [H, W, 3] (RGB) or [H, W, 4] (RGBA). Never fetches from the network. A PIL image that already qualifies is
        returned without a copy.
      name: the image's name in errors, such as "record 12, image 0"; by default its path or kind.
      frame: frame of an animation or page of a TIFF, from 0. Without it, more than one is an error.

    Applies EXIF orientation. Composites transparency on white, since artwork with a transparent background is drawn for
    white pages: dropping alpha would expose the colour underneath, usually black, and hide black text.
    Greyscale in modes I;16 and I counts as 16 bits and is divided by 257. Mode F counts as 0..1 if all values fit, else
    as 0..255. Values outside these ranges are refused. Colour profiles are ignored.

    Raises:
      ImageError: the source cannot become such a picture; names it.
    """
    return _read(source, name, lambda image, label: _to_upright_rgb(image, label, frame))


def size_of(data: bytes, name: str, frame: int | None) -> tuple[int, int]:
    """Width and height in the file's header, before rotation. Decodes no pixels.

    Raises:
      ImageError: as `open_image`, as far as the header shows.
    """

    def use(image: Image.Image, label: str) -> tuple[int, int]:
        _to_frame(image, label, frame)
        return image.size

    return _read(data, name, use)


def pixels_of(data: bytes, name: str, frame: int | None) -> tuple[tuple[int, int], bytes]:
    """Like `open_image`, but returns the size and the RGB bytes, row by row, to be passed between processes."""
    image = open_image(data, name=name, frame=frame)
    return image.size, image.tobytes()


def _read(source: ImageSource, name: str | None, use: Callable[[Image.Image, str], _Result]) -> _Result:
    """Opens an image and returns `use(image, label)`."""
    label = name if name is not None else _describe(source)
    try:
        if isinstance(source, Image.Image):
            return use(source, label)
        if isinstance(source, np.ndarray):
            return use(_from_array(source, label), label)
        file = _readable(source, label)
        try:
            with Image.open(file, formats=FORMATS) as image:
                return use(image, label)
        except (ImageError, FileNotFoundError, MemoryError):
            raise
        except Exception:  # perhaps in metadata: an oversized text, a broken profile
            bare = _bare(file)
            if bare is None:
                raise
        with Image.open(io.BytesIO(bare), formats=FORMATS) as image:
            return use(image, label)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageSizeError(f"{label}: out of memory; scale it down first") from error
    except FileNotFoundError as error:
        raise ImageError(f"{label}: no such file; correct the path {_short(source)}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{label}: not an image in a known format; repair it, or convert it to one of {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"{label}: {_short(error)}; scale it down first") from error
    except Exception as error:  # on broken bytes, PIL raises anything from struct.error to AttributeError
        reason = _short(getattr(error, "strerror", None) or error)
        raise ImageError(f"{label}: cannot be read ({type(error).__name__}: {reason}); repair or remove it") from error


def _bare(file: str | os.PathLike[str] | io.BytesIO) -> bytes | None:
    """A PNG file stripped of chunks that do not affect pixels; None for other formats."""
    with contextlib.nullcontext(file) if isinstance(file, io.BytesIO) else open(file, "rb") as stream:
        stream.seek(0)
        kept = [stream.read(8)]
        if kept != [b"\x89PNG\r\n\x1a\n"]:
            return None
        while head := stream.read(8):  # length and kind, followed by body and checksum
            rest = stream.read(int.from_bytes(head[:4]) + 4)
            if head[4:] in _PNG_CHUNKS:
                kept += [head, rest]
    return b"".join(kept)


# Pixels, palette, transparency, orientation, animation.
_PNG_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")


def _to_upright_rgb(image: Image.Image, label: str, frame: int | None) -> Image.Image:
    given, before = image, image.tell()
    try:
        if _to_frame(image, label, frame):
            image = image.copy()
        image.load()
    finally:
        if given.tell() != before:
            given.seek(before)  # the PIL image is the caller's
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        transparency = {key: value for key, value in image.info.items() if key == "transparency"}
        image = image.transpose(turn)
        image.info = transparency  # drops the orientation, now applied
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image, label)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # PIL cannot convert La to RGBA
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, _WHITE)
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(image: Image.Image, label: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{label}: it is empty ({width}x{height} pixels); remove it")
    if width * height > MAX_PIXELS:
        raise ImageSizeError(
            f"{label}: {width}x{height} pixels are more than the limit of {MAX_PIXELS}; scale it down first"
        )
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)  # PIL allocates a whole tile
    if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > max(width * height, _MAX_TILE_PIXELS):
        raise ImageSizeError(
            f"{label}: {width}x{height} pixels in tiles of {tile[0]}x{tile[1]}; save it with smaller ones"
        )


def _to_frame(image: Image.Image, label: str, frame: int | None) -> bool:
    """Seeks to the requested frame and checks its header; returns whether the image has other frames.

    Does not count frames: PIL would walk the whole file, at some milliseconds per TIFF page.
    """
    _check_size(image, label)
    is_one = not getattr(image, "is_animated", False)
    if frame is None:
        # The first picture of an MPO is the photograph; the others are previews, gain maps or stereo partners.
        if is_one or image.format == "MPO":
            return False
        message = 'it has several frames or pages; add "frame": 0 to the image for the first, or the number of another'
        raise ImageError(f"{label}: {message}")
    if frame == 0 and is_one:
        return False
    try:
        if frame < 0 or is_one:
            raise EOFError
        image.seek(frame)
    except EOFError:
        raise ImageError(f"{label}: there is no frame {frame}; they are numbered from 0") from None
    _check_size(image, label)  # TIFF pages differ in size
    return True


def _orientation(image: Image.Image) -> int:
    """The orientation tag, even if other tags are broken; 1 by default."""
    if type(image) is Image.Image and not image.info:  # made in memory
        return 1
    try:
        value = _exif_orientation(image.info.get("exif", b""))
        return image.getexif().get(ExifTags.Base.Orientation, 1) if value is None else value
    except Exception:  # PIL raises many kinds on garbled EXIF; the picture itself is fine
        return 1


def _exif_orientation(exif: bytes) -> int | None:
    """Reads the orientation from an EXIF block: a TIFF without a picture, with (tag, type, count, value) entries."""
    exif = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(exif[:4])
    if order is None:
        return None
    (at,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", exif, entry)
        if tag == ExifTags.Base.Orientation:
            form = {1: "B", 3: "H", 4: "I"}.get(kind)
            return struct.unpack_from(order + form, exif, entry + 8)[0] if form else None
    return None


def _to_8_bits(image: Image.Image, label: str) -> Image.Image:
    """Scales 16-bit or float greyscale to mode L. PIL's conversion clips at 255."""
    pixels_HW = np.asarray(image)
    low, high = pixels_HW.min(), pixels_HW.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # also false for NaN
            raise ImageError(f"{label}: float pixels from {low} to {high}; rescale them to 0..1 or to 0..255")
        grey_HW = np.rint(pixels_HW * 255 if high <= 1 else pixels_HW)
    else:
        if low < 0 or high > 65535:
            raise ImageError(f"{label}: integer pixels from {low} to {high}; rescale them to 16 bits, 0..65535")
        grey_HW = (pixels_HW.astype(np.int32) + 128) // 257  # round to nearest: 65535 / 255 = 257
    transparent = image.info.get("transparency")  # the transparent grey level of a 16-bit PNG
    if transparent is not None:
        grey_HW[pixels_HW == transparent] = 255
    return Image.fromarray(grey_HW.astype(np.uint8))


def _from_array(array: np.ndarray, label: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"{label}: an array of {array.dtype}; convert it to uint8, 0..255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"{label}: an array of shape {array.shape}; pass [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.size == 0:
        raise ImageError(f"{label}: an empty array of shape {array.shape}; remove it")
    return Image.fromarray(array)


def _readable(source: Any, label: str) -> str | os.PathLike[str] | io.BytesIO:
    """A path, or encoded bytes as a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _as_file(bytes(source), label)
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _as_file(_data_uri_bytes(source, label), label)
        if _URL.match(source):
            raise ImageError(f"{label}: {_short(source)} is a URL, which is not fetched; pass a local path or bytes")
        return source
    if isinstance(source, os.PathLike):
        return source
    kind = type(source).__name__
    raise ImageError(f"{label}: a {kind} is not an image; pass a PIL image, path, bytes, data URI or uint8 numpy array")


def _as_file(data: bytes, label: str) -> io.BytesIO:
    if not data:
        raise ImageError(f"{label}: it has 0 bytes; remove it")
    return io.BytesIO(data)


def _data_uri_bytes(uri: str, label: str) -> bytes:
    parts = split_data_uri(uri)
    if parts is None:
        raise ImageError(f"{label}: {_short(uri)} is not an image data URI; write 'data:image/png;base64,...'")
    payload, is_base64 = parts
    if not is_base64:
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return decode_base64(payload)
    except ValueError as error:
        raise ImageError(f"{label}: its base64 text is broken ({error}); encode it again") from error


def split_data_uri(uri: str) -> tuple[str, bool] | None:
    """The raw payload of a `data:image/...` URI, and whether it is base64; None for any other text."""
    header, comma, payload = uri.partition(",")
    media_type, *parameters = header.strip()[len("data:") :].split(";")
    if not comma or header[:5].lower() != "data:" or not media_type.lower().startswith("image/"):
        return None
    return payload, "base64" in [parameter.strip().lower() for parameter in parameters]


def decode_base64(payload: str) -> bytes:
    """Decodes a base64 payload, which may contain white space and escapes. Raises ValueError if it is broken."""
    return base64.b64decode(b"".join(urllib.parse.unquote_to_bytes(payload).split()), validate=True)


def _describe(source: Any) -> str:
    """The name of an unnamed image in errors."""
    if isinstance(source, Image.Image):
        path = getattr(source, "filename", "")
        return f"image {_short(path)}" if path else "PIL image"
    if isinstance(source, np.ndarray):
        return f"image array of shape {source.shape}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "image of a data URI"
    if isinstance(source, (str, os.PathLike)):
        return f"image {_short(source)}"
    return "image"


def _short(value: object) -> str:
    return textwrap.shorten(str(value), 200) if " " in str(value) else str(value)[:200]

"""Anything that a record may hold as an image -> one upright RGB picture, or an `ImageError` that names it.

Three things are decided here because PIL would decide them silently, and badly for a training set: transparency is
laid on white, greyscale deeper than 8 bits is scaled instead of clipped, and animations are refused instead of losing
all but their first frame.
"""

import base64
import io
import os
import re
import textwrap
import urllib.parse
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from stepjax.errors import ImageError

ImageSource = Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray

# Checked against the header, before a pixel is decoded. PIL's own threshold: a quarter of a gibibyte of 24-bit colour.
MAX_PIXELS = 89_478_485

# What is tried on encoded bytes. Left out on purpose: EPS and WMF, which run other programs, and formats so loosely
# marked that broken bytes pass for them. JPEG covers the multi-picture files (MPO) of cameras and phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO", "QOI")

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WHITE = (255, 255, 255)


def open_image(source: ImageSource, *, name: str | None = None, frame: int | None = None) -> Image.Image:
    """Reads one picture: loaded, upright, mode RGB.

    Args:
      source: a PIL image, a path, the bytes of a file, a `data:image/...` URI, or a uint8 array [H, W], [H, W, 1],
        [H, W, 3] (RGB) or [H, W, 4] (RGBA). Nothing is fetched from the network. A PIL image that is already as it
        should be is returned itself, without a copy.
      name: what errors call the image, such as "record 12, image 0"; by default its path or kind.
      frame: which frame of an animation or page of a TIFF, from 0. Without it, more than one is an error.

    EXIF orientation is applied. Transparency is composited on white, since artwork with a transparent ground is drawn
    for white pages: dropping alpha would show the colour stored underneath, mostly black, on which black text is lost.
    Greyscale in modes I;16 and I is taken as 16 bits and divided by 257; in mode F, as 0..1 where all values lie in
    it and as 0..255 otherwise; values beyond those ranges are refused. Colour profiles are ignored.

    Raises:
      ImageError: for anything that cannot become such a picture, naming it.
    """
    label = name if name is not None else _describe(source)
    try:
        if isinstance(source, Image.Image):
            return _to_upright_rgb(source, label, frame)
        if isinstance(source, np.ndarray):
            return _to_upright_rgb(_from_array(source, label), label, frame)
        with Image.open(_readable(source, label), formats=FORMATS) as image:
            return _to_upright_rgb(image, label, frame)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{label}: there is no such file; correct the path {_short(source)}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{label}: no image in a known format; it is damaged, or must be converted to one of {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{label}: {_short(error)}; scale it down first") from error
    except Exception as error:  # broken bytes make PIL's decoders raise anything, from struct.error to AttributeError
        reason = _short(getattr(error, "strerror", None) or error)
        raise ImageError(f"{label}: cannot be read ({type(error).__name__}: {reason}); repair or remove it") from error


def _to_upright_rgb(image: Image.Image, label: str, frame: int | None) -> Image.Image:
    _check_size(image, label)
    image = _pick_frame(image, label, frame)
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image, label)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # PIL knows no way from La to RGBA
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
        raise ImageError(
            f"{label}: {width}x{height} pixels are more than the limit of {MAX_PIXELS}; scale it down first"
        )


def _pick_frame(image: Image.Image, label: str, frame: int | None) -> Image.Image:
    """The frame asked for, detached from its file; the image itself if it has one frame only."""
    if frame is None:
        # The further pictures of an MPO are previews, gain maps and stereo partners of its first, the photograph.
        # `is_animated` comes first because counting the frames of a GIF walks the whole file.
        if not getattr(image, "is_animated", False) or image.format == "MPO":
            return image
        count = getattr(image, "n_frames", 1)
        raise ImageError(f"{label}: it has {count} frames; choose one with frame=0 to frame={count - 1}")
    count = getattr(image, "n_frames", 1)
    if not 0 <= frame < count:
        raise ImageError(f"{label}: frame={frame} does not exist; the image has {count}, counted from 0")
    if count == 1:
        return image
    before = image.tell()
    image.seek(frame)
    _check_size(image, label)  # pages of a TIFF differ in size
    picked = image.copy()
    image.seek(before)  # a PIL image belongs to the caller
    return picked


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises many kinds on garbled EXIF; such a block states no orientation, the picture is sound
        return 1


def _to_8_bits(image: Image.Image, label: str) -> Image.Image:
    """Greyscale of 16 bits or floats -> mode L, by scale. PIL's own conversion clips at 255."""
    pixels_HW = np.asarray(image)
    low, high = pixels_HW.min(), pixels_HW.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # written so that NaN fails too
            raise ImageError(f"{label}: float pixels from {low} to {high}; rescale them to 0..1 or to 0..255")
        grey_HW = np.rint(pixels_HW * 255 if high <= 1 else pixels_HW)
    else:
        if low < 0 or high > 65535:
            raise ImageError(f"{label}: integer pixels from {low} to {high}; rescale them to 16 bits, 0..65535")
        grey_HW = (pixels_HW.astype(np.int32) + 128) // 257  # to the nearest: 65535 / 255 = 257
    transparent = image.info.get("transparency")  # one grey level of a 16-bit PNG
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
            raise ImageError(f"{label}: {_short(source)} is a URL, and nothing is fetched; pass a local path or bytes")
        return source
    if isinstance(source, os.PathLike):
        return source
    kind = type(source).__name__
    raise ImageError(f"{label}: a {kind} is no image; pass a PIL image, path, bytes, data URI or uint8 numpy array")


def _as_file(data: bytes, label: str) -> io.BytesIO:
    if not data:
        raise ImageError(f"{label}: it has 0 bytes; remove it")
    return io.BytesIO(data)


def _data_uri_bytes(uri: str, label: str) -> bytes:
    parts = split_data_uri(uri)
    if parts is None:
        raise ImageError(f"{label}: {_short(uri)} is no data URI of an image; write 'data:image/png;base64,...'")
    payload, is_base64 = parts
    if not is_base64:
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return decode_base64(payload)
    except ValueError as error:
        raise ImageError(f"{label}: its base64 text is broken ({error}); encode it again") from error


def split_data_uri(uri: str) -> tuple[str, bool] | None:
    """The payload of a `data:image/...` URI as it stands there, and whether it is base64; None of another text."""
    header, comma, payload = uri.partition(",")
    media_type, *parameters = header.strip()[len("data:") :].split(";")
    if not comma or header[:5].lower() != "data:" or not media_type.lower().startswith("image/"):
        return None
    return payload, "base64" in [parameter.strip().lower() for parameter in parameters]


def decode_base64(payload: str) -> bytes:
    """The bytes of such a payload, which may hold white space and escapes. ValueError where it is broken."""
    return base64.b64decode(b"".join(urllib.parse.unquote_to_bytes(payload).split()), validate=True)


def _describe(source: Any) -> str:
    """What errors call an image that was given no name."""
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

"""STEP3-VL for Transformers: images to views, text to tokens. Exported by stepjax; needs no other file of it.

H, W: pixels down and across. G: global views. C: crops. S: side of a view. Sizes are (width, height), as in PIL.

An image is one `<im_patch>` in the text, and becomes all its crops and then its global view:

    <patch_start> <im_patch> x crop tokens <patch_end>  [<patch_newline> after the last crop of a row, but the last row]
    ...
    <im_start> <im_patch> x global tokens <im_end>
"""

import base64
import io
import urllib.request

import numpy as np
from PIL import ExifTags, Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs

IMAGE = "<im_patch>"
MAX_PIXELS = 89_478_485  # of a thin image when it is padded

# What makes an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source) -> Image.Image:
    """A PIL image, uint8 array, path, URL, data URI, or the bytes of a file, as one upright RGB picture.

    Transparency is composited on white. Greyscale deeper than 8 bits is scaled, where PIL would clip it.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=60) as reply:
            source = reply.read()
    elif isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.partition(",")[2])
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        image = source if isinstance(source, Image.Image) else Image.open(source)
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError(f"an image has {image.n_frames} frames: pass one, image.seek(frame) and then image.copy()")
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises many kinds on garbled EXIF; such a block states no orientation, the picture is sound
        orientation = 1
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # PIL knows no way from La to RGBA
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, (255, 255, 255))
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    pixels_HW = np.asarray(image)
    low, high = pixels_HW.min(), pixels_HW.max()
    if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):  # written so that NaN fails too
        raise ValueError(f"an image has pixels from {low} to {high}: scale them to 0..1, 0..255 or 16 bits")
    if image.mode == "F":
        grey_HW = np.rint(pixels_HW * 255 if high <= 1 else pixels_HW)
    else:
        grey_HW = (pixels_HW.astype(np.int32) + 128) // 257
    transparent = image.info.get("transparency")  # one grey level of a 16-bit PNG
    if transparent is not None:
        grey_HW[pixels_HW == transparent] = 255
    return Image.fromarray(grey_HW.astype(np.uint8))


class Step3VLProcessor(ProcessorMixin):
    """Makes the model's inputs. Its settings are those of `processor_config.json`; lengths are pixels."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        chat_template=None,
        size=728,  # side of a global view
        crop_size=504,
        patch_size=14,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        max_side=3024,
        small_aspect=1.5,  # images within `size` are cropped only beyond this aspect ratio
        elongated_aspect=4.0,  # beyond it the crop window shrinks to the short side
        round_up_fraction=0.2,  # a remainder above this fraction of a window gets a window of its own
        thin_side=32,  # thinner images beyond elongated_aspect are padded to a square
        small_is_inclusive=True,  # an image whose long side is exactly `size` is small
        max_crops=128,  # refuse images that need more crops; None lifts the guard
    ):
        self.size, self.crop_size, self.patch_size = size, crop_size, patch_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.max_side = max_side
        self.small_aspect = small_aspect
        self.elongated_aspect = elongated_aspect
        self.round_up_fraction = round_up_fraction
        self.thin_side = thin_side
        self.small_is_inclusive = small_is_inclusive
        self.max_crops = max_crops
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Inputs of `model.generate` and `model.forward`.

        Args:
            images: one, or as many as the text has `<im_patch>`, in a list or in one list a text; see `open_image`.
            text: one text, or a list. With several, pass `padding=True`.
            kwargs: of the tokenizer, such as `return_tensors="pt"`.
        """
        known = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options = {"add_special_tokens": False, "return_token_type_ids": False, **known["text_kwargs"]}
        return_tensors = options.pop("return_tensors", None)
        texts = [text] if isinstance(text, str) else list(text)
        places = [text.count(IMAGE) for text in texts]
        if isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
            given, expected = [len(list(_flat(row))) for row in images], places
        else:
            given, expected = [len(list(_flat(images)))], [sum(places)]
        if given != expected:
            raise ValueError(f"{given} images are given, and the text has {IMAGE} for {expected}: each needs the other")
        views = [self.make_views(open_image(image)) for image in _flat(images)]
        layouts = iter([layout for _, _, layout in views])
        parts = [text.split(IMAGE) for text in texts]
        texts = [first + "".join(next(layouts) + part for part in rest) for first, *rest in parts]
        inputs = dict(self.tokenizer(texts, **options))
        if views:
            inputs["pixel_values"] = np.stack([view for view, _, _ in views])
            inputs["num_patches"] = np.array([len(crops) for _, crops, _ in views])
            if inputs["num_patches"].any():
                inputs["patch_pixel_values"] = np.concatenate([crops for _, crops, _ in views])
        return BatchFeature(inputs, tensor_type=return_tensors)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in Transformers. Content may also be a string or None, and images `image_url` items."""
        is_batch = isinstance(conversation[0], (list, tuple))
        chats = [
            [{**message, "content": _items(message.get("content"))} for message in chat]
            for chat in (conversation if is_batch else [conversation])
        ]
        return super().apply_chat_template(chats if is_batch else chats[0], *args, **kwargs)

    def make_views(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray, str]:
        """The views of an RGB image, float32 [3, S, S] and [C, 3, S, S], and what stands for it in the text.

        8-bit resizing for the size cap and for the grid of crops, then float resizing to the sizes that the encoder
        takes. Quotients are truncated exactly where the public processor does it: a last bit decides borderline sizes.
        """
        width, height = image.size
        aspect = width / height
        is_elongated = aspect > self.elongated_aspect or aspect < 1 / self.elongated_aspect
        if min(width, height) < self.thin_side and is_elongated:
            if max(width, height) ** 2 > MAX_PIXELS:
                raise ValueError(f"an image of {width}x{height} pixels is too thin: crop it or scale it down")
            square = Image.new("RGB", (max(width, height),) * 2)
            square.paste(image)
            image = square
        longest = max(image.size)
        if longest > self.max_side:
            scale = self.max_side / longest
            image = _resize(image, (int(image.width * scale), int(image.height * scale)))
        global_view_3SS = self._view(image, self.size)

        window = self._window(*image.size)
        sides = [self._whole_windows(side, window) for side in image.size] if window else [0, 0]
        columns, rows = (max(1, side // window) if window else 0 for side in sides)
        if self.max_crops is not None and columns * rows > self.max_crops:
            raise ValueError(
                f"an image of {width}x{height} pixels would be cut into {columns * rows} crops, over "
                f"max_crops={self.max_crops}: raise the limit, or cut the image into less elongated pieces"
            )
        crops_C3SS = np.empty((columns * rows, 3, self.crop_size, self.crop_size), np.float32)
        layout = ""
        if window:
            image = _resize(image, (sides[0], sides[1]))
            for index in range(columns * rows):
                x, y = index % columns * window, index // columns * window
                # What lies beyond an image that is lower or narrower than the window is black.
                crops_C3SS[index] = self._view(image.crop((x, y, x + window, y + window)), self.crop_size)
                layout += "<patch_start>" + IMAGE * self._tokens(self.crop_size) + "<patch_end>"
                if x // window == columns - 1 and index + 1 < columns * rows:
                    layout += "<patch_newline>"
        return global_view_3SS, crops_C3SS, layout + "<im_start>" + IMAGE * self._tokens(self.size) + "<im_end>"

    def _window(self, width: int, height: int) -> int:
        """Side of the square crops; 0 for none."""
        longest, shortest = max(width, height), min(width, height)
        aspect = longest / shortest
        if longest <= self.size if self.small_is_inclusive else longest < self.size:
            return shortest if aspect > self.small_aspect else 0
        return min(shortest, self.crop_size) if aspect > self.elongated_aspect else self.crop_size

    def _whole_windows(self, side: int, window: int) -> int:
        """`side` rounded to a multiple of the window; a side below one window is kept."""
        if side < window:
            return side
        whole = side // window
        return window * (whole + 1 if side / window - whole > self.round_up_fraction else whole)

    def _tokens(self, side: int) -> int:
        """Features of a view: two convolutions of stride 2 halve its patches along a side, rounding up."""
        return ((side // self.patch_size - 1) // 4 + 1) ** 2

    def _view(self, image: Image.Image, side: int) -> np.ndarray:
        """Resizes to a square in float, without rounding back to 8 bits, and normalises; [3, side, side]."""
        view_HW3 = np.empty((side, side, 3), np.float32)
        for index, channel in enumerate(image.split()):
            if image.size != (side, side):
                channel = channel.convert("F").resize((side, side), Image.Resampling.BILINEAR)
            view_HW3[:, :, index] = np.asarray(channel)
        view_HW3 /= np.float32(255)
        view_HW3 -= np.asarray(self.image_mean, np.float32)
        view_HW3 /= np.asarray(self.image_std, np.float32)
        return view_HW3.transpose(2, 0, 1)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def _flat(images):
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    elif images is not None:
        yield images


def _items(content) -> list[dict]:
    """The items of a message's content, every image under the key "image"."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    items = []
    for item in content:
        if item.get("type") == "image_url":
            url = item["image_url"]
            item = {"type": "image", "image": url["url"] if isinstance(url, dict) else url}
        elif item.get("type") == "image" and "base64" in item:
            item = {"type": "image", "image": "data:image;base64," + item["base64"]}
        items.append(item)
    return items

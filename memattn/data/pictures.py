"""Pictures of any mode of Pillow as float32 arrays in 0..1, without loss of values."""

from typing import Any

import numpy as np

from memattn.checks import must

# what is converted, losing nothing but rounding: bits, palettes, other colour spaces, premultiplied
_CONVERTED = {
    "1": "L",
    "P": "RGB",
    "PA": "RGBA",
    "La": "LA",
    "RGBX": "RGB",
    "RGBa": "RGBA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
}
_BYTES = ("L", "LA", "RGB", "RGBA")


def image_to_array(column: str, image: Any, image_size: int | None) -> np.ndarray:
    """A Pillow image as float32 ``[C, H, W]`` in 0..1, with 1 to 4 channels by its mode.

    Grey has one channel and colour three, palettes included; alpha is one more. Integers are
    taken as 16-bit values and divided by 65535, as floats must be in 0..1 already.

    Args:
        column: Where it comes from, for messages.
        image: The image.
        image_size: Height and width that it is scaled to; None takes it as it is.

    Raises:
        ValueError: If integers are not in 0..65535, floats not in 0..1, or the mode is another.
    """
    mode = image.mode
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif mode in _CONVERTED:
        image = image.convert(_CONVERTED[mode])
    if image.mode in _BYTES:
        if image_size is not None:
            image = image.resize((image_size, image_size))
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if mode == "F":
        wanted, largest = "floats in 0..1", 1.0
    elif mode == "I" or mode.startswith("I;16"):
        wanted, largest = "integers in 0..65535", 65535.0
    else:
        known = ", ".join((*_BYTES, *_CONVERTED, "I", "I;16", "F"))
        must(f"column {column!r}", f"have images of mode {known}", mode)
    values = np.asarray(image, dtype=np.float64)
    outside = values[~((values >= 0.0) & (values <= largest))]  # NaN too
    if outside.size:
        must(f"column {column!r}", f"have, in images of mode {mode}, {wanted}", outside[0])
    pixels = (values / largest).astype(np.float32)
    if image_size is not None:
        from PIL import Image

        scaled = Image.fromarray(pixels).resize((image_size, image_size))
        pixels = np.asarray(scaled).clip(0.0, 1.0)  # bicubic weights overshoot
    return pixels[None]

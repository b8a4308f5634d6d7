"""What the pixels of an image file become. Needs no torch, so that small processes can use it."""

import numpy as np
from PIL import Image, ImageOps

from recast_pl.rules import ImageSize, height_and_width


def fit(image: Image.Image, size: ImageSize) -> Image.Image:
    """An image upright, as RGB on white, its centre cropped to the shape and resized.

    Args:
        image: Any image; its pixels are read now if they were not yet.
        size: Height and width of the result in pixels, as one number if they are equal.

    Raises:
        ValueError: If its pixels have no known range.
    """
    image = to_rgb(image)
    height, width = height_and_width(size)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright and RGB. Transparent parts become white, as on a page, rather than the colour that they hide."""
    image = _to_eight_bits(ImageOps.exif_transpose(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales a 16-bit image to 8 bits, which Pillow's own conversion would clip; returns others unchanged."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.array(image, dtype=np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    values += 128  # with the next line: values / 257, rounded, in place because images may be large
    values //= 257
    return Image.fromarray(values.astype(np.uint8))

"""Encoded images as PIL's, none larger than its header may say."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from tandem.errors import invalid

#: Those that the contract names. PIL knows others, some of which start programs.
_FORMATS = ("PNG", "JPEG", "WEBP")
#: A few bytes can say that they are gigabytes of pixels: of one image, and of a call's together.
_MAX_PIXELS = 2**26
_MAX_CALL_PIXELS = 2**28


def decoded(encoded: Mapping[str, bytes]) -> list[Any]:
    """The images, by the name of the field that holds each, as PIL's. May take seconds.

    Raises:
        InvalidArgument: names the field of one that is none, or too large. Sizes are checked before any is decoded.
    """
    opened, pixels = {}, 0
    for field, data in encoded.items():
        opened[field] = image = _opened(data, field)
        own = image.width * image.height
        if own > _MAX_PIXELS:
            raise invalid(field, f"{image.width} x {image.height} is more than {_MAX_PIXELS} pixels")
        pixels += own
        if pixels > _MAX_CALL_PIXELS:
            raise invalid(field, f"the call's images have more than {_MAX_CALL_PIXELS} pixels up to this one")
    return [_rgb(image, field) for field, image in opened.items()]


def _opened(data: bytes, field: str) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise invalid(field, f"not a PNG, JPEG or WebP image: {error}") from error


def _rgb(image: Any, field: str) -> Any:
    try:
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken data
        raise invalid(field, f"not an image: {error}") from error

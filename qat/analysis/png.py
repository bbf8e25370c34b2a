"""Small pictures as data URIs, for pages that load nothing."""

import base64
import struct
import zlib

from torch import Tensor


def png(image: Tensor) -> bytes:
    """A PNG file.

    Args:
        image: grey or RGB, shape [1 or 3, height, width], float; [0, 1] is black to white, what is beyond is clipped.

    Source: W3C 2003, "Portable Network Graphics (PNG) Specification (Second Edition)", sections 5 and 7 to 11.
    """
    channels, height, width = image.shape
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    lines = b"".join(b"\0" + pixels[row].tobytes() for row in range(height))  # filter 0: as they are
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def data_uri(image: Tensor) -> str:
    """The picture as a URI that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()

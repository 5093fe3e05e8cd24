"""Small pictures and sounds in every format that the module reads, made byte by byte."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from collections.abc import Callable

import numpy as np

SIDE = 6


def _pixels() -> bytes:
    return np.random.default_rng(2).integers(0, 256, SIDE * SIDE * 3, np.uint8).tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png() -> bytes:
    """Return a PNG with 8-bit RGB."""
    rows = _pixels()
    raw = b"".join(bytes([i % 5]) + rows[i * SIDE * 3 :][: SIDE * 3] for i in range(SIDE))
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")


def png_palette() -> bytes:
    """Return an interlaced PNG with a palette and transparency."""
    head = struct.pack(">IIBBBBB", 4, 4, 2, 3, 0, 0, 0)
    raw = b"".join(b"\0" + b"\x1b" for _ in range(4))
    parts = (
        (b"IHDR", head),
        (b"PLTE", bytes(range(12))),
        (b"tRNS", b"\0\x80"),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def bmp() -> bytes:
    """Return a BMP of 24 bits."""
    row = -(-SIDE * 3 // 4) * 4
    body = _pixels().ljust(row * SIDE, b"\0")[: row * SIDE]
    return (
        struct.pack("<2sIHHI", b"BM", 54 + len(body), 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, 0, len(body), 2835, 2835, 0, 0)
        + body
    )


def bmp_palette() -> bytes:
    """Return a BMP of 8 bits with a palette, rows from the top."""
    head = struct.pack("<IiiHHIIiiII", 40, 4, -4, 1, 8, 0, 16, 0, 0, 4, 0)
    return struct.pack("<2sIHHI", b"BM", 86, 0, 0, 70) + head + bytes(range(16)) + bytes(i % 4 for i in range(16))


def tga() -> bytes:
    """Return a run-length coded TGA."""
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 4, 4, 24, 0) + b"\x8f\x01\x02\x03"


def gif() -> bytes:
    """Return a GIF of one pixel, in two frames."""
    frame = b"\x21\xf9\x04\x01\x05\0\0\0\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0"
    return b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff" + frame * 2 + b";"


def pnm() -> bytes:
    """Return a PPM with a comment."""
    return b"P6\n# x\n%d %d\n255\n" % (SIDE, SIDE) + _pixels()


def psd() -> bytes:
    """Return a PSD of raw channels."""
    head = struct.pack(">4sH6sHIIHH", b"8BPS", 1, bytes(6), 3, 2, 2, 8, 3)
    return head + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + bytes(range(12))


def hdr() -> bytes:
    """Return a Radiance picture."""
    return b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2 +X 2\n" + bytes(range(100, 116))


def pic() -> bytes:
    """Return a Softimage PIC."""
    head = b"\x53\x80\xf6\x34" + bytes(84) + b"PICT" + struct.pack(">HHfHH", 2, 2, 1.0, 3, 0)
    return head + b"\0\x08\0\xe0" + bytes(range(12))


def jpeg() -> bytes:
    """Return a gray baseline JPEG of one block."""
    table = b"\xff\xdb\0\x43\0" + bytes([1] * 64)
    frame = b"\xff\xc0\0\x0b\x08\0\x08\0\x08\x01\x01\x11\0"
    codes = (
        b"\xff\xc4\0\x15\0"
        + bytes([1, 1])
        + bytes(14)
        + b"\0\x01"
        + b"\xff\xc4\0\x15\x10"
        + bytes([1, 1])
        + bytes(14)
        + b"\0\x11"
    )
    return b"\xff\xd8" + table + frame + codes + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\x2a\x5f" + b"\xff\xd9"


def wav(width: int = 2, channels: int = 1, rate: int = 16000) -> bytes:
    """Return a WAV of 200 frames."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.random.default_rng(3).bytes(200 * width * channels))
    return out.getvalue()


def wav_float() -> bytes:
    """Return a WAV of 32-bit floats with an extensible header."""
    guid = b"\x03\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    head = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16000, 64000, 4, 32, 22, 32, 4) + guid
    data = np.linspace(-1, 1, 100, dtype="<f4").tobytes()
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def wav_adpcm() -> bytes:
    """Return a WAV of Microsoft's ADPCM."""
    pairs = (256, 0, 512, -256, 0, 0, 192, 64, 240, 0, 460, -208, 392, -232)
    head = struct.pack("<HHIIHHHHH14h", 2, 1, 8000, 4000, 32, 4, 32, 52, 7, *pairs)
    data = (b"\0\x10\0\x01\0\x02\0" + bytes(25)) * 4
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def mp3() -> bytes:
    """Return frames of MPEG 1 layer 3, silent, behind an ID3 tag."""
    return b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + (b"\xff\xfb\x90\x64" + bytes(413)) * 3


def flac() -> bytes:
    """Return a FLAC whose one frame holds a constant."""
    info = struct.pack(">HH", 192, 192) + bytes(6) + ((16000 << 44) | (15 << 36) | 192).to_bytes(8, "big") + bytes(16)
    frame = _crc8(b"\xff\xf8\x15\x08\0") + b"\0\x12\x34"
    return b"fLaC\x80" + len(info).to_bytes(3, "big") + info + frame + _crc(frame, 16, 0x8005).to_bytes(2, "big")


def _crc8(data: bytes) -> bytes:
    return data + bytes([_crc(data, 8, 0x07)])


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> (bits - 1) else 0)) & ((1 << bits) - 1)
    return value


IMAGES: tuple[Callable[[], bytes], ...] = (png, png_palette, bmp, bmp_palette, tga, gif, pnm, psd, hdr, pic, jpeg)
SOUNDS: tuple[Callable[[], bytes], ...] = (
    wav, lambda: wav(1, 2, 8000), lambda: wav(3), lambda: wav(4, 2, 44100), wav_float, wav_adpcm, mp3, flac,
)  # fmt: skip

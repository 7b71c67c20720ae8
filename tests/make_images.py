#!/usr/bin/env python3
"""Make tests/images: small images of every kind that rs reads, and what Pillow makes of them.

usage: make_images.py        (needs Pillow before 13, which resizes some shapes along the columns first)

Writes into the folder `images` beside this file: the images, manifest.json, and expected.bin with the RGB bytes of each image, end to
end in the order of the manifest.  The manifest also has checksums of resized pictures, whose source is a pattern that the test makes
too.  Run it again only to add cases; the files are committed.
"""

import io
import json
import os
import struct
import zlib

import PIL
from PIL import Image, ImageOps

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
WIDTH, HEIGHT = 23, 17  # of most images: no multiple of anything


def noise(count):
    """Bytes that test_image.cpp makes too: the high bytes of a linear congruential generator."""
    state, out = 1, bytearray()
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        out.append(state >> 24)
    return bytes(out)


def picture(width=WIDTH, height=HEIGHT):
    """A picture with smooth parts, an edge and some colour, different in every corner."""
    data = bytearray()
    for y in range(height):
        for x in range(width):
            inside = (x - width / 3) ** 2 + (y - height / 2) ** 2 < (height / 3) ** 2
            data += bytes((230, 40, 60) if inside else (x * 255 // width, y * 255 // height, (x * 7 + y * 3) % 256))
    return Image.frombytes("RGB", (width, height), bytes(data))


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, rows, interlaced=False, extra=b""):
    """A PNG of raw rows (a list, of each pass in turn), each without a filter."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced)))
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def interlaced_png(image):
    """Adam7, which Pillow reads but does not write."""
    rows = []
    for x0, y0, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        for y in range(y0, image.height, dy):
            row = b"".join(bytes(image.getpixel((x, y))) for x in range(x0, image.width, dx))
            if row:
                rows.append(row)
    return png(image.width, image.height, 8, 2, rows, True)


def images():
    """Name, bytes, and by how many levels rs may differ: decoders of JPEG round the transform and the colours each in their own way."""
    rgb = picture()
    alpha = Image.linear_gradient("L").resize(rgb.size)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    grey_alpha = rgb.convert("LA")
    grey_alpha.putalpha(alpha)
    indexed = rgb.quantize(11)
    wide = Image.frombytes("RGB", (97, 3), noise(97 * 9))
    values = [i * 1367 % 65536 for i in range(WIDTH * HEIGHT * 3)]

    def sixteen(channels):
        step = WIDTH * channels
        return [struct.pack(">%dH" % step, *values[y * step:(y + 1) * step]) for y in range(HEIGHT)]

    yield "rgb.jpg", saved(rgb, "JPEG", quality=90), 3
    yield "444.jpg", saved(rgb, "JPEG", quality=90, subsampling=0), 3
    yield "422.jpg", saved(rgb, "JPEG", quality=90, subsampling=1), 6
    yield "progressive.jpg", saved(rgb, "JPEG", quality=80, progressive=True), 3
    yield "restarts.jpg", saved(rgb, "JPEG", quality=80, restart_marker_blocks=1), 3
    yield "grey.jpg", saved(rgb.convert("L"), "JPEG"), 3
    yield "cmyk.jpg", saved(rgb.convert("CMYK"), "JPEG", quality=90), 3
    yield "keep-rgb.jpg", saved(rgb, "JPEG", quality=90, keep_rgb=True), 3
    yield "wide.jpg", saved(wide, "JPEG", quality=95, subsampling=0), 3
    yield "exif.jpg", saved(rgb, "JPEG", quality=90, exif=oriented(6)), 3
    yield "rgb.png", saved(rgb, "PNG"), 0
    yield "rgba.png", saved(rgba, "PNG"), 0
    yield "grey.png", saved(rgb.convert("L"), "PNG"), 0
    yield "grey-alpha.png", saved(grey_alpha, "PNG"), 0
    yield "black-white.png", saved(rgb.convert("1"), "PNG"), 0
    yield "indexed.png", saved(indexed, "PNG"), 0
    yield "indexed-alpha.png", saved(indexed, "PNG", transparency=bytes(range(0, 110, 10))), 0
    yield "colour-key.png", saved(rgb, "PNG", transparency=(230, 40, 60)), 0
    yield "interlaced.png", interlaced_png(rgb), 0
    yield "rgb16.png", png(WIDTH, HEIGHT, 16, 2, sixteen(3)), 0
    yield "exif.png", saved(rgb, "PNG", exif=oriented(8)), 0
    yield "one.png", saved(rgb.crop((0, 0, 1, 1)), "PNG"), 0
    yield "rgb.bmp", saved(rgb, "BMP"), 0
    yield "indexed.bmp", saved(indexed, "BMP"), 0
    yield "black-white.bmp", saved(rgb.convert("1"), "BMP"), 0
    yield "rgba.bmp", saved(rgba, "BMP"), 0
    yield "indexed.gif", saved(indexed, "GIF"), 0
    yield "transparent.gif", saved(indexed, "GIF", transparency=3), 0
    yield "animated.gif", saved(indexed, "GIF", save_all=True, append_images=[rgb.rotate(90).quantize(16)], duration=50), 0
    frame = bytearray(saved(indexed, "GIF"))
    frame[6], frame[8] = WIDTH + 6, HEIGHT + 4  # a larger screen
    at = frame.index(b"\x2c", 13 + 3 * (2 << (frame[10] & 7)))
    frame[at + 1], frame[at + 3] = 4, 1
    yield "offset.gif", bytes(frame), 0
    yield "rgb.ppm", saved(rgb, "PPM"), 0
    yield "grey.pgm", saved(rgb.convert("L"), "PPM"), 0
    yield "hundred.ppm", b"P6\n# a comment\n3 2 # another\n100\n" + bytes(range(0, 90, 5)), 0
    yield "sixteen.ppm", b"P6 3 1 1000\n" + struct.pack(">9H", 0, 1, 2, 500, 333, 999, 1000, 250, 750), 0


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def expected(data):
    image = Image.open(io.BytesIO(data))
    return ImageOps.exif_transpose(image).convert("RGB")


SIZES = [  # of the source, of the result
    (500, 375, 341, 256), (37, 53, 256, 366), (64, 64, 64, 31), (64, 64, 17, 64), (100, 30, 224, 224), (1, 1, 7, 5), (7, 5, 1, 1),
    (999, 3, 20, 9), (3, 400, 20, 9), (2, 190, 5, 40), (640, 480, 32, 32), (33, 17, 33, 17), (31, 29, 30, 28), (5, 300, 3, 400)]


def resized():
    """Source size and kind, size, filter (by Pillow's number) and the CRC-32 of the RGB bytes."""
    source = noise(3 * 640 * 480)
    hard = bytes(255 if v > 127 else 0 for v in source)  # overshoots at every edge
    for width, height, to_width, to_height in SIZES:
        for filter_number in range(6):
            kind = filter_number % 2
            image = Image.frombytes("RGB", (width, height), (hard if kind else source)[:3 * width * height])
            result = image.resize((to_width, to_height), filter_number)
            yield [width, height, kind, to_width, to_height, filter_number, zlib.crc32(result.tobytes())]


def main():
    assert int(PIL.__version__.split(".")[0]) < 13, "Pillow %s resizes in another order" % PIL.__version__
    os.makedirs(FOLDER, exist_ok=True)
    entries, all_bytes = [], b""
    # 4 MB for one pixel; what Pillow makes of it is of no interest.
    with open(os.path.join(FOLDER, "bomb.png"), "wb") as f:
        f.write(png(1, 1, 8, 2, [bytes(4 << 20)]))
    for name, data, tolerance in images():
        with open(os.path.join(FOLDER, name), "wb") as f:
            f.write(data)
        image = expected(data)
        entries.append({"name": name, "width": image.width, "height": image.height, "tolerance": tolerance})
        all_bytes += image.tobytes()
    with open(os.path.join(FOLDER, "expected.bin"), "wb") as f:
        f.write(all_bytes)
    with open(os.path.join(FOLDER, "manifest.json"), "w", encoding="utf-8") as f:
        f.write('{"pillow": "%s",\n "images": [\n  %s],\n "resized": [\n  %s]}\n' % (
            PIL.__version__, ",\n  ".join(json.dumps(e) for e in entries), ",\n  ".join(json.dumps(r) for r in resized())))


if __name__ == "__main__":
    main()

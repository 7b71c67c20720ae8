#!/usr/bin/env python3
"""Photographs to the f32 pixels that a vision encoder takes; run by tools/bench-peers in the peers' virtual environment.

usage: pictures.py CONFIG     CONFIG: a JSON object with model (its preprocessor_config.json says how), size (pixels, square), photos
                              (paths), made (without photos: how many pictures that stand for them), out (a file of f32 [n, 3, size, size])

Every engine gets the same pixels, so what is compared is the encoders alone.  made_pictures is what OpenVINO's int8 weights are
calibrated on as well (prepare.py).
"""

import json
import os
import sys

import numpy


def made_pictures(count, size, first):
    """u8 [size, size, 3], a seed each: noise whose amplitudes fall off by 1 / f, as those of photographs do, with ellipses and boxes of
    other colours and textures on it."""
    at = numpy.fft.fftfreq(size)
    frequency = numpy.hypot(at[:, None], at[None, :])
    frequency[0, 0] = 1  # the mean is set below
    rows, columns = numpy.mgrid[0:size, 0:size] / size
    for seed in range(first, first + count):
        rng = numpy.random.default_rng(seed)

        def texture(fall):
            # Colours of neighbours go together: most of the noise is brightness.
            spectrum = numpy.fft.fft2(rng.standard_normal((4, size, size))) / frequency ** fall
            spectrum[:, 0, 0] = 0
            noise = numpy.fft.ifft2(spectrum).real
            noise /= noise.std(axis=(1, 2), keepdims=True)
            return numpy.moveaxis(noise[:1] + 0.3 * noise[1:], 0, 2)

        picture = rng.uniform(60, 180, 3) + rng.uniform(30, 60) * texture(1.0)
        for _ in range(rng.integers(2, 7)):
            y, x, h, w = rng.uniform(0, 1, 2).tolist() + rng.uniform(0.05, 0.4, 2).tolist()
            dy, dx = (rows - y) / h, (columns - x) / w
            inside = dy * dy + dx * dx < 1 if rng.random() < 0.6 else numpy.maximum(abs(dy), abs(dx)) < 1
            shape = rng.uniform(0, 255, 3) + rng.uniform(5, 40) * texture(rng.uniform(0.5, 1.5))
            picture = numpy.where(inside[:, :, None], shape, picture)
        yield numpy.clip(picture + 0.5, 0, 255).astype(numpy.uint8)


class Preparation:
    """What preprocessor_config.json asks for, at a size: resize (shortest edge, or both), crop the middle, scale, normalise."""

    def __init__(self, model, size):
        with open(os.path.join(model, "preprocessor_config.json"), encoding="utf-8") as f:
            c = json.load(f)
        edge, crop = c["size"], c["crop_size"]["height"] if c.get("do_center_crop") else None
        self.size = size
        # At another size than the model's own, the crop has the same share of the image.
        self.edge = round(edge["shortest_edge"] * size / crop) if "shortest_edge" in edge and crop else None
        self.resample = c["resample"]
        self.scale = c["rescale_factor"] if c.get("do_rescale", True) else 1.0
        self.mean, self.std = (numpy.array(c[k], numpy.float32) for k in ("image_mean", "image_std"))

    def photo(self, path):
        from PIL import Image, ImageOps
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        if self.edge is None:
            return self.pixels(numpy.asarray(image.resize((self.size, self.size), self.resample)))
        w, h = image.size
        short = min(w, h)
        w, h = (self.edge if n == short else int(self.edge * n / short) for n in (w, h))
        left, top = (w - self.size) // 2, (h - self.size) // 2
        return self.pixels(numpy.asarray(image.resize((w, h), self.resample))[top:top + self.size, left:left + self.size])

    def pixels(self, rgb):
        values = (rgb.astype(numpy.float32) * numpy.float32(self.scale) - self.mean) / self.std
        return numpy.ascontiguousarray(numpy.moveaxis(values, 2, 0), numpy.float32)


def main():
    config = json.loads(sys.argv[1])
    prepare = Preparation(config["model"], config["size"])
    photos = config["photos"]
    with open(config["out"] + ".part", "wb") as f:
        for pixels in (map(prepare.photo, photos) if photos else map(prepare.pixels, made_pictures(config["made"], config["size"], 1))):
            f.write(pixels.tobytes())
    os.replace(config["out"] + ".part", config["out"])


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What bench-peers gives to vision encoders, and what rs makes of it.  Needs NumPy, which bench-peers finds in its own environment; some
tests need more (a model, reference data) and say so where they skip."""

import array
import json
import os
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = os.environ.get("RS_SHARED") or os.path.join(ROOT, "..", "shared")
BUILD = os.environ.get("RS_BUILD_DIR") or os.path.join(ROOT, "build")
MODEL = os.path.join(os.path.dirname(os.environ.get("RS_TEST_MODEL_DIR") or os.path.join(ROOT, "build", "models", "x")), "dinov2-small")

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "tools", "bench"))
# pylint: disable=wrong-import-position
import driver  # noqa: E402
import rslib  # noqa: E402
import worker  # noqa: E402

try:
    import numpy
    import pictures
except ImportError:
    numpy = None
try:
    import PIL
except ImportError:
    PIL = None

WANT_NUMPY = unittest.skipUnless(numpy, "needs NumPy")
PREPROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "resample": 3,
                "rescale_factor": 1 / 255, "image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.25, 2.0]}


@WANT_NUMPY
class Pictures(unittest.TestCase):
    def preparation(self, pixels, **changes):
        tmp = tempfile.TemporaryDirectory(prefix="rs-pictures-")
        self.addCleanup(tmp.cleanup)
        with open(os.path.join(tmp.name, "preprocessor_config.json"), "w", encoding="utf-8") as f:
            json.dump(dict(PREPROCESSOR, **changes), f)
        return pictures.Preparation(tmp.name, pixels)

    def test_made_pictures(self):
        some = list(pictures.made_pictures(3, 96, 5))
        self.assertEqual([p.shape for p in some], [(96, 96, 3)] * 3)
        again = list(pictures.made_pictures(2, 96, 6))
        self.assertTrue((some[1] == again[0]).all() and (some[2] == again[1]).all())  # the seed alone decides
        self.assertFalse((some[0] == some[1]).all())
        for p in some:
            values = p.astype(float)
            self.assertGreater(values.std(), 15)
            # Noise would have sqrt(2) times the deviation between neighbours; photographs have much less.
            self.assertLess(numpy.diff(values, axis=1).std(), 0.7 * values.std())

    def test_pixels(self):
        rgb = numpy.zeros((28, 28, 3), numpy.uint8)
        rgb[0, 0] = 255
        pixels = self.preparation(28).pixels(rgb)
        self.assertEqual((pixels.shape, pixels.dtype), ((3, 28, 28), numpy.float32))
        numpy.testing.assert_allclose(pixels[:, 0, 0], [1, 3, 0.5], rtol=1e-6)
        numpy.testing.assert_allclose(pixels[:, 1, 1], [-1, -1, 0], rtol=1e-6)

    @unittest.skipUnless(PIL, "needs Pillow")
    def test_photo(self):
        from PIL import Image
        prepare = self.preparation(28)
        with tempfile.TemporaryDirectory() as tmp:
            path = os.path.join(tmp, "a.png")
            # Red on the left, green on the right: what is cropped is the middle.
            image = numpy.zeros((64, 128, 3), numpy.uint8)
            image[:, :64, 0] = image[:, 64:, 1] = 255
            Image.fromarray(image).save(path)
            got = prepare.photo(path)
            numpy.testing.assert_allclose(got[0, :, :10], 1, rtol=1e-6)
            numpy.testing.assert_allclose(got[0, :, -10:], -1, rtol=1e-6)
            numpy.testing.assert_allclose(got[1, :, -10:], 3, rtol=1e-6)
            # Twice the size takes twice the edge: the same part of the image.
            twice = self.preparation(56).photo(path)
            numpy.testing.assert_allclose(twice[:, ::2, :20:2], got[:, :, :10], rtol=1e-6)
            self.assertEqual(self.preparation(28, size={"height": 28, "width": 28}, do_center_crop=False).photo(path).shape, (3, 28, 28))

    @unittest.skipUnless(PIL, "needs Pillow")
    def test_golden_pixels(self):
        golden, photos = os.path.join(SHARED, "golden"), os.path.join(SHARED, "data", "photos")
        if not os.path.isdir(golden) or not os.path.exists(os.path.join(MODEL, "preprocessor_config.json")):
            self.skipTest("needs %s and %s" % (golden, MODEL))
        with open(os.path.join(golden, "dinov2_photos.json"), encoding="utf-8") as f:
            names = json.load(f)[:6]
        want = numpy.load(os.path.join(golden, "dinov2_pixels_first6.npy"))
        prepare = pictures.Preparation(MODEL, 224)
        got = numpy.stack([prepare.photo(os.path.join(photos, n)) for n in names])
        # Made by Pillow too; decoders of other versions may differ by a grey level or two, of 1 / 255 / 0.224 each.
        self.assertLess(abs(got - want).max(), 2.5 / 255 / 0.224)

    def test_peers_encode_in_parts(self):
        class Sums(worker.Peer):
            parts = []

            def encode_images(self, pixels):
                self.parts.append(len(pixels))
                return pixels.sum(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0]
        values = numpy.arange(10 * 3 * 4, dtype=numpy.float32).reshape(10, 3, 2, 2)
        peer = Sums({"threads": 1})
        for batch, parts in ((4, [4, 4, 2]), (10, [10]), (1, [1] * 10)):
            Sums.parts = []
            out = peer.images(bytearray(values.tobytes()), 10, 2, batch)()
            self.assertEqual(Sums.parts, parts)
            self.assertEqual(out[:, 0].tolist(), values.sum(axis=(1, 2, 3)).tolist())


class Rs(unittest.TestCase):
    """rs_encode_images by ctypes, on the real model."""

    @classmethod
    def setUpClass(cls):
        cls.golden = os.path.join(SHARED, "golden", "dinov2_pixels_first6.npy")
        for path in (cls.golden, os.path.join(MODEL, "model.safetensors"), os.path.join(BUILD, "rs")):
            if not os.path.exists(path):
                raise unittest.SkipTest("needs %s" % path)
        try:
            rslib.library_path(BUILD)
        except FileNotFoundError as e:
            raise unittest.SkipTest(str(e)) from None
        cls.tmp = tempfile.TemporaryDirectory(prefix="rs-pictures-")
        cls.addClassCleanup(cls.tmp.cleanup)
        weights = driver.rs_weights(BUILD, MODEL, cls.tmp.name, ["f32"])["f32"]
        cls.rs = rslib.Rs(BUILD, weights, 2)

    def array(self, name):
        """The floats of a .npy file of the first version: a header, then values."""
        with open(os.path.join(os.path.dirname(self.golden), name), "rb") as f:
            data = f.read()
        self.assertEqual(data[:8], b"\x93NUMPY\x01\x00")
        head = 10 + int.from_bytes(data[8:10], "little")
        self.assertIn(b"'<f4'", data[:head])
        return bytearray(data[head:])

    def test_class_features_are_the_reference_s(self):
        pixels, want = self.array("dinov2_pixels_first6.npy"), array.array("f", self.array("dinov2_cls_f32.npy"))
        whole = list(self.rs.images_call(pixels, 6, 224, 6, None)())
        self.assertEqual(len(whole), 6 * 384)
        for i in range(6):
            a, b = whole[i * 384:(i + 1) * 384], want[i * 384:(i + 1) * 384]
            distance = sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b)
            self.assertLess(distance, 1e-8)  # f32, twelve layers: 1e-4 of the length, squared
        self.assertEqual(list(self.rs.images_call(pixels, 6, 224, 4, None)()), whole)

    def test_drop(self):
        pixels = self.array("dinov2_pixels_first6.npy")
        whole, dropped = (list(self.rs.images_call(pixels, 1, 224, 1, d)()) for d in (None, "ratios=0,0,0.5 score=random"))
        self.assertEqual(len(dropped), 384)
        self.assertNotEqual(whole, dropped)
        with self.assertRaisesRegex(RuntimeError, "rs: .*halve"):
            self.rs.images_call(pixels, 1, 224, 1, "halve")

    def test_too_few_pixels(self):
        with self.assertRaisesRegex(ValueError, "expected at least"):
            self.rs.images_call(bytearray(12 * 224 * 224 - 1), 1, 224, 1, None)


if __name__ == "__main__":
    unittest.main(verbosity=2)  # which says why a test skipped

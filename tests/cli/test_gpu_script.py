#!/usr/bin/env python3
"""tests/gpu.sh without a card: that it skips, what it does with a library that emulates one, and what it packs for a machine with one."""

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest

SOURCE = os.environ["RS_SOURCE_DIR"]
SCRIPT = os.path.join(SOURCE, "tests", "gpu.sh")
LIBRARY = os.environ["RS_CUDA_HOST_LIBRARY"]
BUILD = os.environ["RS_BUILD_DIR"]
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(SOURCE, "tests"))

import gpu_models  # noqa: E402  pylint: disable=wrong-import-position


def run(*parts, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RS_GPU_")}
    environment.update(variables)
    return subprocess.run([SCRIPT, *parts], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = temporary.name

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def emulated(self, *parts, library=LIBRARY, **variables):
        """-> (exit status, report, output)"""
        report = self.path("report.md")
        result = run(*parts, **{"RS_GPU_FAKE": library, "RS_GPU_REPORT": report, "RS_GPU_BUILD": BUILD, **variables})
        with open(report, encoding="utf-8") as f:
            return result.returncode, f.read(), result.stdout


class WithoutACard(Folder):
    def test_skips(self):
        # A PATH in which nvidia-smi, if there is one, finds nothing.
        tool = self.path("nvidia-smi")
        with open(tool, "w", encoding="utf-8") as f:
            f.write("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
        os.chmod(tool, 0o755)
        for parts in ((), ("--use", self.folder)):
            result = run(*parts, PATH=self.folder + os.pathsep + os.environ["PATH"], RS_GPU_REPORT=self.path("report.md"))
            self.assertEqual(result.returncode, 0, result.stdout)
            self.assertEqual(result.stdout, "skipped: nvidia-smi finds no card\n")
            self.assertFalse(os.path.exists(self.path("report.md")))

    def test_wrong_usage(self):
        for parts, said in ((("--pack",), "usage:"), (("--use",), "usage:"), (("--pack", "a", "tests"), "usage:"),
                            (("--use", self.path("none")), "no folder"), (("shims",), "no part shims")):
            result = run(*parts, RS_GPU_FAKE=LIBRARY, RS_GPU_BUILD=BUILD)
            self.assertEqual(result.returncode, 2, result.stdout)
            self.assertIn(said, result.stdout)


class Emulated(Folder):
    def test_all_parts(self):
        status, report, output = self.emulated()
        self.assertEqual(status, 0, output)
        for line in ("| test_cuda | passed |", "| test_graph | passed |", "| the same graphs as on the CPU | passed |"):
            self.assertIn(line, report)
        self.assertRegex(report, r"\| test_cuda \| passed \| [0-9]+ \| [1-9][0-9]* \|")
        self.assertIn("none: librs_cuda_host.so", report)
        self.assertNotIn("FAILED", report)

    def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(self):
        status, report, output = self.emulated("shim", "tests", library="/nowhere/librs-cuda.so")
        self.assertEqual(status, 1, output)
        for line in ("| test_cuda | FAILED |", "| the same graphs as on the CPU | FAILED |", "## What failed", "/nowhere/librs-cuda.so"):
            self.assertIn(line, report)

    def test_time_ends(self):
        status, report, output = self.emulated("tests", RS_GPU_FULL="1", RS_GPU_SECONDS="2")  # of some quarter of a minute
        self.assertEqual(status, 1, output)
        self.assertRegex(report, r"\| test_cuda \| FAILED \| [123] \| its time was over \|")
        self.assertIn("| test_graph | not run | 0 | no time was left |", report)


class Counted(Folder):
    """A program that ran no test, or whose tests skipped themselves, is a success to GoogleTest."""

    def report_of(self, tests):
        """of the part test_cuda, where that program runs such tests, and there is no model"""
        os.makedirs(self.path("tests"), exist_ok=True)
        for name in ("rs", "tests/test_cuda"):
            with open(self.path(name), "w", encoding="utf-8") as f:
                f.write('#!/bin/sh\nexec "%s" --gtest_brief=1 --gtest_filter="%s"\n' % (os.path.join(BUILD, "tests", "test_cuda"), tests))
        status, report, output = self.emulated("--use", self.folder, "tests")
        self.assertIn("| test_graph | skipped |", report)  # it is not there
        return status, next(line for line in report.splitlines() if line.startswith("| test_cuda |")), output

    def test_no_test_is_a_failure(self):
        status, row, output = self.report_of("graph_on_a_card.of_another_name")
        self.assertEqual(status, 1, output)
        self.assertRegex(row, r"^\| test_cuda \| FAILED \| [0-9]+ \| status 1: Failure: no test ran \|$")

    def test_tests_that_skip_are_counted(self):
        skips = "device.info_says_where_a_model_runs"
        status, row, output = self.report_of(skips)
        self.assertEqual(status, 0, output)
        self.assertRegex(row, r"^\| test_cuda \| skipped \| [0-9]+ \| skipped: no minilm-q8.rsw \|$")
        status, row, output = self.report_of(skips + ":device.names")
        self.assertEqual(status, 0, output)
        self.assertRegex(row, r"^\| test_cuda \| passed \| [0-9]+ \| 2, of which 1 skipped \|$")


class Packed(Folder):
    """What is carried to another machine, here of the build at hand: libraries of C++ are then beside the programs, not in them."""

    def test_runs_wherever_it_is(self):
        os.mkdir(self.path("none"))
        result = run("--pack", self.path("first"), RS_GPU_FAKE=LIBRARY, RS_GPU_BUILD=BUILD, RS_GPU_MODELS=self.path("none"))
        self.assertEqual(result.returncode, 0, result.stdout)
        self.assertIn("all-MiniLM-L6-v2: what wants it will not run", result.stdout)
        there = self.path("second")
        os.rename(self.path("first"), there)
        wanted = subprocess.run(["ldd", os.path.join(there, "tests", "test_graph")], stdout=subprocess.PIPE, text=True, check=True).stdout
        self.assertIn(os.path.join(there, "tests", "..", "librs.so.0"), wanted)
        names = os.listdir(there)
        self.assertTrue(any(n.startswith("libutf8proc.so.") for n in names), names)
        self.assertFalse(any(n.startswith(("libc.so", "libm.so", "ld-linux")) for n in names), names)
        with open(os.path.join(there, "commit"), "w", encoding="utf-8") as f:
            f.write("abcdef0\n")
        # What it wants of a build folder, it has: there is none.
        status, report, output = self.emulated("--use", there, "tests", "shim", "models", RS_GPU_BUILD=self.path("none"),
                                               library=os.path.join(there, "librs-cuda.so"))
        self.assertEqual(status, 0, output)
        self.assertIn(", abcdef0 |", report)
        self.assertIn("none: librs-cuda.so", report)
        again = run("--pack", self.path("none"), RS_GPU_FAKE=LIBRARY, RS_GPU_BUILD=BUILD)
        self.assertEqual(again.returncode, 1, again.stdout)
        self.assertIn("is there, and not of --pack", again.stdout)
        for line in ("| test_cuda | passed |", "| test_graph | passed |", "| the same graphs as on the CPU | passed |"):
            self.assertIn(line, report)


class Models(Folder):
    def test_weights_come_back_as_near_as_5_bits_are(self):
        rng = random.Random(1)
        tensors = {"a.weight": ([3, 50], [rng.gauss(0, 0.1) for _ in range(150)]), "zeros": ([2, 4], [0.0] * 8),
                   "conv": ([2, 3, 2, 2], [rng.gauss(0, 2) for _ in range(24)]), "bias": ([5], [rng.gauss(0, 1) for _ in range(5)]),
                   "class": ([1, 1, 4], [0.25, -3.0, 1e-3, 7.5])}
        os.mkdir(self.path("from"))
        header, data = {"__metadata__": {"format": "pt"}}, b""
        for name, (shape, values) in tensors.items():
            code = "e" if name == "conv" else "f"
            part = struct.pack("<%d%s" % (len(values), code), *values)
            header[name] = {"dtype": "F16" if code == "e" else "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
            data += part
        text = json.dumps(header).encode()
        with open(self.path("from", "model.safetensors"), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + data)
        with open(self.path("from", "config.json"), "w", encoding="utf-8") as f:
            f.write("{}")
        self.assertEqual(gpu_models.main(["round", self.path("from"), self.path("to")]), 0)
        self.assertEqual(sorted(os.listdir(self.path("to"))), ["config.json", "weights.rounded"])
        self.assertEqual(gpu_models.main(["restore", self.path("to")]), 0)
        found = {name: (shape, list(values)) for name, shape, values in gpu_models.read_safetensors(self.path("to", "model.safetensors"))}
        self.assertEqual(found.keys(), tensors.keys())
        for name, (shape, values) in tensors.items():
            self.assertEqual(found[name][0], shape)
            rows = shape[0] if len(shape) > 1 and shape[0] > 1 else 0
            cols = len(values) // rows if rows else len(values)
            for i in range(0, len(values), cols):
                most = max(map(abs, values[i:i + cols]))
                for v, got in zip(values[i:i + cols], found[name][1][i:i + cols]):
                    self.assertLessEqual(abs(v - got), (0.51 / 15 if rows else 1 / 2000) * most)


if __name__ == "__main__":
    unittest.main(verbosity=2)

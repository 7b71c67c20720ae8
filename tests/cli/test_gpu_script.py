#!/usr/bin/env python3
"""tests/gpu.sh without a card: that it skips, and what it does with a library that emulates one."""

import os
import subprocess
import tempfile
import unittest

SOURCE = os.environ["RS_SOURCE_DIR"]
SCRIPT = os.path.join(SOURCE, "tests", "gpu.sh")


def run(*parts, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RS_GPU_")}
    environment.update(variables)
    return subprocess.run([SCRIPT, *parts], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


class WithoutACard(unittest.TestCase):
    def test_skips(self):
        with tempfile.TemporaryDirectory() as folder:
            # A PATH in which nvidia-smi, if there is one, finds nothing.
            tool = os.path.join(folder, "nvidia-smi")
            with open(tool, "w", encoding="utf-8") as f:
                f.write("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
            os.chmod(tool, 0o755)
            result = run(PATH=folder + os.pathsep + os.environ["PATH"], RS_GPU_REPORT=os.path.join(folder, "report.md"))
            self.assertEqual(result.returncode, 0, result.stdout)
            self.assertEqual(result.stdout, "skipped: nvidia-smi finds no card\n")
            self.assertFalse(os.path.exists(os.path.join(folder, "report.md")))


class Emulated(unittest.TestCase):
    def parts(self, library, *parts):
        """-> (exit status, report)"""
        with tempfile.TemporaryDirectory() as folder:
            report = os.path.join(folder, "report.md")
            result = run(*parts, RS_GPU_FAKE=library, RS_GPU_REPORT=report, RS_GPU_BUILD=os.environ["RS_BUILD_DIR"])
            with open(report, encoding="utf-8") as f:
                return result.returncode, f.read(), result.stdout

    def test_all_parts(self):
        status, report, output = self.parts(os.environ["RS_CUDA_HOST_LIBRARY"])
        self.assertEqual(status, 0, output)
        for line in ("| test_cuda | passed |", "| test_graph | passed |",
                     "| the same graphs as on the CPU | passed |"):
            self.assertIn(line, report)
        self.assertIn("none: librs_cuda_host.so", report)
        self.assertNotIn("FAILED", report)

    def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(self):
        status, report, output = self.parts("/nowhere/librs-cuda.so", "shim", "tests")
        self.assertEqual(status, 1, output)
        for line in ("| test_cuda | FAILED |", "| the same graphs as on the CPU | FAILED |", "## What failed",
                     "/nowhere/librs-cuda.so"):
            self.assertIn(line, report)


if __name__ == "__main__":
    unittest.main(verbosity=2)

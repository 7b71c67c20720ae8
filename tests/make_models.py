#!/usr/bin/env python3
"""Make the weight files that the tests use: fetch all-MiniLM-L6-v2 and convert it once a type.

Reads RS_TEST_MODEL_DIR (a model folder, fetched to there when absent), RS_TEST_MODELS (where the files go), RS_PROGRAM.
Exit status 77, and nothing written, where the model cannot be fetched; 1 where it cannot be converted.
"""

import os
import subprocess
import sys

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    folder, models, program = (os.environ[n] for n in ("RS_TEST_MODEL_DIR", "RS_TEST_MODELS", "RS_PROGRAM"))
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        fetch = [sys.executable, os.path.join(SOURCE, "tools", "fetch-model"), "all-MiniLM-L6-v2", folder]
        if subprocess.run(fetch, check=False).returncode != 0:
            print("skipped: needs all-MiniLM-L6-v2, which cannot be fetched, nor is it in $RS_TEST_MODEL_DIR")
            return 77
    os.makedirs(models, exist_ok=True)
    for kind in ("f32", "f16", "q8", "q4"):
        path = os.path.join(models, "minilm-%s.rsw" % kind)
        if os.path.exists(path) and os.path.getmtime(path) > os.path.getmtime(program):
            continue
        # A converter that fails must not leave an older one's file to be tested.
        if os.path.exists(path):
            os.remove(path)
        result = subprocess.run([program, "convert", folder, "-o", path, "--type", kind], check=False)
        if result.returncode != 0 or not os.path.exists(path):
            print("'rs convert --type %s' failed with exit status %d" % (kind, result.returncode))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Make the weight files that the tests use: fetch all-MiniLM-L6-v2 and convert it once a type.

Reads RS_TEST_MODEL_DIR (a model folder, fetched to there when absent), RS_TEST_MODELS (where the files go), RS_PROGRAM.
Classifiers, sst2-minilm of texts and cifar10-dinov2-s of images, are made beside the model folder by $RS_SHARED/models/make-models (else
../shared) where that is there.
Exit status 77, and nothing written, where the model cannot be fetched; 1 where it cannot be converted.
"""

import os
import subprocess
import sys

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True  # the tools' folder stays as it is in the repository
sys.path.insert(0, os.path.join(SOURCE, "tools", "bench"))

import made_models  # noqa: E402  pylint: disable=wrong-import-position


def convert(program, folder, models, name, kinds):
    """Weight files NAME-KIND.rsw, but for those that are newer than the program.  False where one cannot be made."""
    for kind in kinds:
        path = os.path.join(models, "%s-%s.rsw" % (name, kind))
        if os.path.exists(path) and os.path.getmtime(path) > os.path.getmtime(program):
            continue
        # A converter that fails must not leave an older one's file to be tested.
        if os.path.exists(path):
            os.remove(path)
        result = subprocess.run([program, "convert", folder, "-o", path, "--type", kind], check=False)
        if result.returncode != 0 or not os.path.exists(path):
            print("'rs convert --type %s' of %s failed with exit status %d" % (kind, name, result.returncode))
            return False
    return True


def make_classifier(folder):
    """Whether a classifier is there, after an attempt to make it."""
    script = os.path.join(os.environ.get("RS_SHARED") or os.path.join(SOURCE, "..", "shared"), "models", "make-models")
    try:
        made_models.make(script, folder)
    except (OSError, RuntimeError) as e:
        print("no %s, its tests will skip: %s" % (os.path.basename(folder), e))
        return False
    return True


def main():
    folder, models, program = (os.environ[n] for n in ("RS_TEST_MODEL_DIR", "RS_TEST_MODELS", "RS_PROGRAM"))
    if not made_models.has_weights(folder):
        fetch = [sys.executable, os.path.join(SOURCE, "tools", "fetch-model"), "all-MiniLM-L6-v2", folder]
        if subprocess.run(fetch, check=False).returncode != 0:
            print("skipped: needs all-MiniLM-L6-v2, which cannot be fetched, nor is it in $RS_TEST_MODEL_DIR")
            return 77
    os.makedirs(models, exist_ok=True)
    if not convert(program, folder, models, "minilm", ("f32", "f16", "q8", "q4")):
        return 1
    for name, files, kinds in (("sst2-minilm", "sst2", ("f32", "q8", "q4")), ("cifar10-dinov2-s", "cifar10", ("f32", "q8"))):
        classifier = os.path.join(os.path.dirname(os.path.abspath(folder)), name)
        if make_classifier(classifier) and not convert(program, classifier, models, files, kinds):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Real models that a script makes (models/make-models of the folder with reference data), for tests and for tools/results.

The script wants numpy, safetensors and onnx: they go into a virtual environment beside the models, and nothing is installed elsewhere.
"""

import os
import subprocess
import sys


def has_weights(folder):
    return os.path.exists(os.path.join(folder, "model.safetensors"))


def _run(command, what):
    r = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if r.returncode != 0:
        said = r.stderr.strip().splitlines()
        raise RuntimeError("%s: %s" % (what, said[-1] if said else "exit status %d" % r.returncode))


def make(script, folder):
    """The model folder, of that name, by that script; where it is there, nothing.  Raises OSError or RuntimeError that says why not."""
    if has_weights(folder):
        return
    if not os.access(script, os.X_OK):
        raise FileNotFoundError("%s holds no model.safetensors, and there is no %s to make it" % (folder, script))
    parent, name = os.path.split(os.path.abspath(folder))
    python = os.path.join(parent, "venv", "bin", "python")
    if not os.access(python, os.X_OK):
        _run([sys.executable, "-m", "venv", os.path.join(parent, "venv")], "python -m venv")
    _run([python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "numpy", "safetensors", "onnx"],
         "pip install numpy safetensors onnx")
    _run([python, script, parent, name], "%s cannot make %s" % (script, name))
    if not has_weights(folder):
        raise RuntimeError("%s left no %s" % (script, os.path.join(folder, "model.safetensors")))

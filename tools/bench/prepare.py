#!/usr/bin/env python3
"""Make the weights of one peer from a Hugging Face folder; run by tools/bench-peers in the peers' virtual environment.

usage: prepare.py NAME CONFIG     NAME: a key of engines.PREPARED; CONFIG: a JSON object with model, folder, pooling, texts (a JSON
                                  file of texts to calibrate on), max_tokens, pad_id, reduce_range, llama (sources of llama.cpp);
                                  of a vision encoder model, folder, image size (pixels, square), reduce_range

All from the same published f32 weights.  ONNX and OpenVINO models pool and normalise inside, which costs them least.  What comes out
is put in its place only when it is whole.  The last line on standard output is a JSON object of facts for the report.
"""

import json
import os
import shutil
import subprocess
import sys

import engines


CALIBRATION_PIXELS = 64 * 224 * 224


def path(config, name):
    return os.path.join(config["folder"], engines.PREPARED[name])


def export_onnx(config, out):
    import torch
    import transformers
    model = transformers.AutoModel.from_pretrained(config["model"], attn_implementation="eager", dtype=torch.float32).eval()

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            states = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
            if config["pooling"] == "cls":
                v = states[:, 0]
            else:
                m = attention_mask.to(states.dtype).unsqueeze(-1)
                v = (states * m).sum(1) / m.sum(1)
            return torch.nn.functional.normalize(v, dim=-1)

    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.randint(1000, model.config.vocab_size, (2, 16))
    axes = {n: {0: "batch", 1: "sequence"} for n in names}
    axes["embedding"] = {0: "batch"}
    # The exporter that the optimizer of ONNX Runtime knows the patterns of.
    torch.onnx.export(Pooled(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), out, opset_version=17, dynamo=False,
                      input_names=names, output_names=["embedding"], dynamic_axes=axes)
    return {}


def plain_dinov2(folder, size):
    """The layers of a Dinov2Model in the plainest operators, for images of one size: its position embeddings are made here, layer scale
    is in the weights before it, and scores are divided by a number, not multiplied: ONNX Runtime's optimizer knows no other attention."""
    import torch
    import transformers
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    patch, heads = model.config.patch_size, model.config.num_attention_heads
    n, width = 1 + (size // patch) ** 2, model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        positions = model.embeddings.interpolate_pos_encoding(torch.zeros(1, n, width * heads), size, size)
        for layer in model.encoder.layer:
            for linear, scale in ((layer.attention.o_proj, layer.layer_scale1), (layer.mlp.fc2, layer.layer_scale2)):
                linear.weight *= scale.lambda1[:, None]
                linear.bias *= scale.lambda1

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.positions = torch.nn.Parameter(positions)

        def forward(self, pixel_values):
            e = self.model.embeddings
            x = e.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
            x = torch.cat([e.cls_token.expand(pixel_values.shape[0], -1, -1), x], 1) + self.positions
            for layer in self.model.encoder.layer:
                h, a = layer.norm1(x), layer.attention
                q, k, v = (f(h).view(-1, n, heads, width).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
                shares = torch.softmax(torch.matmul(q, k.transpose(2, 3)) / width ** 0.5, -1)
                x = layer.attention.o_proj(torch.matmul(shares, v).transpose(1, 2).reshape(-1, n, heads * width)) + x
                x = layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(layer.norm2(x)))) + x
            return self.model.layernorm(x)[:, 0]
    return Plain()


def export_images(config, out):
    import torch
    import transformers
    size = config["image size"]
    pixels = torch.randn(2, 3, size, size)
    reference = transformers.AutoModel.from_pretrained(config["model"], dtype=torch.float32).eval()
    plain = plain_dinov2(config["model"], size)
    with torch.no_grad():
        want, got = reference(pixel_values=pixels).last_hidden_state[:, 0], plain(pixels)
    difference = ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()
    if not difference < 1e-4:
        raise RuntimeError("the plain definition differs from the model by %g of its length" % difference)
    torch.onnx.export(plain, (pixels,), out, opset_version=17, dynamo=False, input_names=["pixel_values"], output_names=["embedding"],
                      dynamic_axes={"pixel_values": {0: "batch"}, "embedding": {0: "batch"}})
    return {"difference": difference}


def optimize_onnx(config, out, half):
    from onnxruntime.transformers import optimizer
    with open(os.path.join(config["model"], "config.json"), encoding="utf-8") as f:
        shape = json.load(f)
    model = optimizer.optimize_model(path(config, "onnx"), model_type="vit" if "image size" in config else "bert", num_heads=shape["num_attention_heads"],
                                     hidden_size=shape["hidden_size"])
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(out)
    return {"fused": {k: v for k, v in model.get_fused_operator_statistics().items() if v}}


def quantize_onnx(config, out, per_channel):
    from onnxruntime.quantization import QuantType, quantize_dynamic
    # Without VNNI, pairs of 8-bit products saturate: weights of 7 bits are what ONNX Runtime advises there.
    # Not the patch convolution: integers make it no faster, only coarser.
    operators = ["MatMul", "Attention"] if "image size" in config else None
    quantize_dynamic(path(config, "ort-f32"), out, weight_type=QuantType.QInt8, per_channel=per_channel, op_types_to_quantize=operators,
                     reduce_range=config["reduce_range"], extra_options={"DefaultTensorType": 1})
    return {"reduce_range": config["reduce_range"]}


def convert_openvino(config, out, int8):
    import openvino
    model = openvino.convert_model(path(config, "onnx"))
    facts = {}
    if int8 and "image size" in config:
        import nncf
        import pictures
        size = config["image size"]
        prepare = pictures.Preparation(config["model"], size)
        count = CALIBRATION_PIXELS // (size * size)
        data = [prepare.pixels(p)[None] for p in pictures.made_pictures(count, size, 1001)]
        model = nncf.quantize(model, nncf.Dataset(data), model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED,
                              subset_size=count)
        facts["calibrated on"] = "%d made pictures" % count
    elif int8:
        import nncf
        import numpy
        import tokenizers
        tokenizer = tokenizers.Tokenizer.from_file(os.path.join(config["model"], "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(config["max_tokens"])
        with open(config["texts"], encoding="utf-8") as f:
            texts = json.load(f)

        def feed(text):
            ids = numpy.array([tokenizer.encode(text).ids], numpy.int64)
            return {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
        model = nncf.quantize(model, nncf.Dataset(texts, feed), model_type=nncf.ModelType.TRANSFORMER,
                              preset=nncf.QuantizationPreset.MIXED, subset_size=len(texts))
        facts["calibrated on"] = "%d texts" % len(texts)
    openvino.save_model(model, out, compress_to_fp16=False)
    return facts


def convert_ctranslate2(config, out, kind):
    import ctranslate2
    ctranslate2.converters.TransformersConverter(config["model"]).convert(out, quantization=kind)
    return {}


def convert_llama(config, out, kind):
    script = os.path.join(config["llama"], "convert_hf_to_gguf.py")
    subprocess.run([sys.executable, script, config["model"], "--outfile", out, "--outtype", kind], check=True,
                   stdout=sys.stderr)
    return {}


MAKERS = {
    "onnx": lambda c, out: (export_images if "image size" in c else export_onnx)(c, out),
    "ort-f32": lambda c, out: optimize_onnx(c, out, False),
    "ort-f16": lambda c, out: optimize_onnx(c, out, True),
    "ort-int8": lambda c, out: quantize_onnx(c, out, False),
    "ort-int8-pc": lambda c, out: quantize_onnx(c, out, True),
    "ov-f32": lambda c, out: convert_openvino(c, out, False),
    "ov-int8": lambda c, out: convert_openvino(c, out, True),
    "ct2-f32": lambda c, out: convert_ctranslate2(c, out, None),
    "ct2-int8": lambda c, out: convert_ctranslate2(c, out, "int8"),
    "llama-f32": lambda c, out: convert_llama(c, out, "f32"),
    "llama-q8": lambda c, out: convert_llama(c, out, "q8_0"),
}


def main():
    name, config = sys.argv[1], json.loads(sys.argv[2])
    final = path(config, name)
    part = os.path.join(config["folder"], "part")
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    facts = MAKERS[name](config, os.path.join(part, os.path.basename(final)))
    if os.path.isdir(final):
        shutil.rmtree(final)
    for made in os.listdir(part):  # an .xml of OpenVINO has a .bin beside it
        os.replace(os.path.join(part, made), os.path.join(config["folder"], made))
    os.rmdir(part)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes tests/vision/<family>/: tiny models of every image family, random weights, and what the reference implementations answer.

  pip install torch transformers timm safetensors && tests/vision/make_fixtures.py

A folder has what a published model has (config.json, preprocessor_config.json, model.safetensors) and expected.safetensors:
  pixels.<w>x<h>   [2, 3, h, w] what the model is given
  cls.<w>x<h>      [2, C] the class token's last state (after the final norm, where it is of all states)
  states.<w>x<h>   [2, T, C] all last states
  embedding.<w>x<h>[2, D] image features of models that compare images with texts; SigLIP: the pooled state
  logits.<w>x<h>   [2, labels]
  text.ids, text.lengths, text.embedding   sequences end to end, and the text features of CLIP
Weights are larger than at initialisation, so that every part shows in the result.
"""
import json, os, sys, tempfile
import torch
from safetensors.torch import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def randomise(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "logit_scale" in name: p.fill_(2.5)
            elif "logit_bias" in name: p.fill_(-3.0)
            elif "norm" in name.lower() and p.dim() == 1 and name.endswith("weight"): p.copy_(1 + 0.3 * torch.randn_like(p))
            elif "layer_scale" in name or ".ls" in name: p.copy_(0.7 + 0.3 * torch.randn_like(p))
            elif p.dim() > 1: p.copy_(torch.randn_like(p) * (2.0 / p[0].numel() ** 0.5 if p.dim() > 1 and p.shape[0] > 1 else 0.7))
            else: p.copy_(0.2 * torch.randn_like(p))
    return model.eval()


def pixels(w, h, seed):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 3, (h + 3) // 4, (w + 3) // 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bilinear")
    return (smooth + 0.2 * torch.randn(2, 3, h, w, generator=g)).contiguous()


def published(model):
    """The weights by the names that they are published with, which those in memory are not."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(folder + "/model.safetensors")


def write(folder, config, weights, expected, processor):
    os.makedirs(folder, exist_ok=True)
    json.dump(config, open(f"{folder}/config.json", "w"), indent=1, sort_keys=True)
    if processor: json.dump(processor, open(f"{folder}/preprocessor_config.json", "w"), indent=1, sort_keys=True)
    save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    save_file({k: v.detach().clone().contiguous() for k, v in expected.items()}, f"{folder}/expected.safetensors")
    print(folder, sum(os.path.getsize(f"{folder}/{f}") for f in os.listdir(folder)), "bytes")


def processor(kind, size, exact=True):
    return {"image_processor_type": kind, "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": MEAN, "image_std": STD,
            **({"size": {"height": size, "width": size}, "do_center_crop": False} if exact else
               {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size}})}


def clean(config):
    d = config.to_dict()
    for k in ("transformers_version", "torch_dtype", "dtype", "_attn_implementation_autoset"): d.pop(k, None)
    for part in ("text_config", "vision_config"):
        if isinstance(d.get(part), dict):
            for k in ("transformers_version", "torch_dtype", "dtype"): d[part].pop(k, None)
    return d


SIZES = [(32, 32), (48, 40), (24, 16)]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)


def classifier(name, model_class, config, kind, seed, interpolate=True):
    config.architectures = [model_class.__name__]
    model = randomise(model_class(config), seed)
    base = getattr(model, model.base_model_prefix)
    expected = {}
    for w, h in SIZES:
        x = pixels(w, h, seed + w)
        extra = {"interpolate_pos_encoding": True} if interpolate else {}
        at = f"{w}x{h}"
        with torch.no_grad():
            states = base(x, **extra).last_hidden_state
            expected[f"logits.{at}"] = model(x, **extra).logits
        expected |= {f"pixels.{at}": x, f"states.{at}": states, f"cls.{at}": states[:, 0]}
    write(f"{HERE}/{name}", clean(config), published(model), expected, processor(kind, 32))


def main():
    import transformers as t
    labels = {i: f"label {i}" for i in range(5)}
    classifier("vit", t.ViTForImageClassification, t.ViTConfig(**SMALL, intermediate_size=64, id2label=labels), "ViTImageProcessor", 1)
    classifier("deit", t.DeiTForImageClassificationWithTeacher, t.DeiTConfig(**SMALL, intermediate_size=64, id2label=labels), "DeiTImageProcessor", 2)
    classifier("dinov2", t.Dinov2ForImageClassification, t.Dinov2Config(**SMALL, mlp_ratio=2, id2label=labels), "BitImageProcessor", 3, False)
    classifier("dinov2-swiglu", t.Dinov2ForImageClassification, t.Dinov2Config(**SMALL, mlp_ratio=2, use_swiglu_ffn=True, id2label=labels),
               "BitImageProcessor", 4, False)
    classifier("dinov2-registers", t.Dinov2WithRegistersForImageClassification,
               t.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=3, id2label=labels), "BitImageProcessor", 5, False)

    # CLIP: both halves.
    config = t.CLIPConfig(projection_dim=24,
                          text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=515,
                                           max_position_embeddings=20, bos_token_id=513, eos_token_id=514, pad_token_id=514, projection_dim=24),
                          vision_config=dict(**SMALL, intermediate_size=64, projection_dim=24))
    config.architectures = ["CLIPModel"]
    model = randomise(t.CLIPModel(config), 6)
    expected = {}
    for w, h in SIZES:
        x, at = pixels(w, h, 60 + w), f"{w}x{h}"
        with torch.no_grad():
            v = model.vision_model(x, interpolate_pos_encoding=True)
            expected |= {f"pixels.{at}": x, f"states.{at}": v.last_hidden_state, f"cls.{at}": v.last_hidden_state[:, 0],
                         f"embedding.{at}": model.visual_projection(v.pooler_output)}
    g = torch.Generator().manual_seed(7)
    ids, lengths, features = [], [], []
    for n in (2, 5, 20, 9):
        s = torch.cat([torch.tensor([513]), torch.randint(0, 513, (n - 2,), generator=g), torch.tensor([514])])[None]
        with torch.no_grad(): features.append(model.text_projection(model.text_model(s).pooler_output)[0])
        ids.append(s[0]); lengths.append(n)
    expected |= {"text.ids": torch.cat(ids).int(), "text.lengths": torch.tensor(lengths).int(), "text.embedding": torch.stack(features)}
    # Bytes alone and at the end of a word, and one merge: as many tokens as the table has.  How bytes are written is GPT-2's way.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = [*letters, *(c + "</w>" for c in letters), "th", "<|startoftext|>", "<|endoftext|>"]
    os.makedirs(f"{HERE}/clip", exist_ok=True)
    json.dump({token: i for i, token in enumerate(tokens)}, open(f"{HERE}/clip/vocab.json", "w"))
    open(f"{HERE}/clip/merges.txt", "w").write("#version: 0.2\nt h\n")
    json.dump({"model_max_length": 20, "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, open(f"{HERE}/clip/tokenizer_config.json", "w"), indent=1)
    write(f"{HERE}/clip", clean(config), published(model), expected, processor("CLIPImageProcessor", 32, False))

    # SigLIP: the image half.
    config = t.SiglipConfig(text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                                             max_position_embeddings=8),
                            vision_config=dict(**SMALL, intermediate_size=64))
    config.architectures = ["SiglipModel"]
    model = randomise(t.SiglipModel(config), 8)
    expected = {}
    for w, h in SIZES:
        x, at = pixels(w, h, 80 + w), f"{w}x{h}"
        with torch.no_grad():
            v = model.vision_model(x, interpolate_pos_encoding=True)
            expected |= {f"pixels.{at}": x, f"states.{at}": v.last_hidden_state, f"embedding.{at}": v.pooler_output}
    write(f"{HERE}/siglip", clean(config), published(model), expected, processor("SiglipImageProcessor", 32))

    # timm's layout, whose weights have no prefix and whose config.json is its own.
    import timm
    from timm.layers import resample_abs_pos_embed
    for name, kind, extra, seed in (("timm-vit", "vit_tiny_patch16_224", {}, 9), ("timm-deit", "deit_tiny_distilled_patch16_224", {}, 10),
                                    ("timm-dinov2-reg", "vit_small_patch14_reg4_dinov2", dict(num_classes=5), 11)):
        make = lambda w, h: timm.create_model(kind, pretrained=False, img_size=(h, w), patch_size=8, embed_dim=32, depth=2, num_heads=2,
                                              **{"num_classes": 5, **extra})
        model = randomise(make(32, 32), seed)
        state, expected = model.state_dict(), {}
        for w, h in SIZES:
            x, at = pixels(w, h, seed * 10 + w), f"{w}x{h}"
            resized, other = dict(state), make(w, h).eval()
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            resized["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [h // 8, w // 8], [4, 4], num_prefix_tokens=prefix)
            other.load_state_dict(resized)
            with torch.no_grad():
                states = other.forward_features(x)
                expected |= {f"pixels.{at}": x, f"states.{at}": states, f"cls.{at}": states[:, 0], f"logits.{at}": other(x)}
        config = {"architecture": kind, "num_classes": 5, "num_features": 32, "global_pool": "token", "model_args": {"num_heads": 2},
                  "label_names": [f"label {i}" for i in range(5)],
                  "pretrained_cfg": {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9,
                                     "crop_mode": "center", "num_classes": 5}}
        write(f"{HERE}/{name}", config, state, expected, None)


if __name__ == "__main__":
    sys.exit(main())

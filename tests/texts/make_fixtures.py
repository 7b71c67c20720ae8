#!/usr/bin/env python3
"""Makes tests/texts/<name>/: tiny models of families that tests/vision has not, random weights, and what transformers answers.

  pip install torch==2.* transformers==5.24.0 tokenizers==0.23.3 safetensors && tests/texts/make_fixtures.py

A folder has what a published model has (config.json, tokenizer.json, tokenizer_config.json, model.safetensors) and
expected.safetensors, of the texts in texts.json, end to end:
  ids, lengths   of tokens, special ones included
  states.<i>     [T, C] behind layer i, 0 being the embeddings, the last behind the final norm
  logits         of the head: [texts, labels], or [T, labels]
  pair.logits    of texts 1 and 2 as a pair
  dropped, restored   [.., C] last states where tokens leave (DROPS), without and with those that left
Weights are larger than at initialisation, so that every part shows in the result.
"""
import json
import os
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.dont_write_bytecode = True
import make_gpt2  # noqa: E402  pylint: disable=wrong-import-position

MERGES = 50
TEXTS = [
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  It's what they'd seen in 2024:\n\n    caf\u00e9, \u65e5\u672c\u8a9e and [MASK]!",
    "Attention of the queries over the keys is a sum of the values; the position of a token turns it.",
    "",
]


DROPS = {0: 0.4, 2: 0.5}  # behind layers 0 and 2, those of which the state has the smallest norm; the first one stays


def dropped(base, ids):
    """What is left of a text, and all of it, by the definition: tokens that stay keep their positions, windows count what is left."""
    position, window, before = torch.arange(len(ids)), base.config.sliding_window, []
    x = base.embeddings(torch.tensor([ids]))
    for i, layer in enumerate(base.layers):
        kind, n = base.config.layer_types[i], x.shape[1]
        far = (torch.arange(n)[:, None] - torch.arange(n)).abs() > window
        mask = torch.zeros(n, n).masked_fill(far, float("-inf"))[None, None] if kind == "sliding_attention" else None
        x = layer(x, attention_mask=mask, position_embeddings=base.rotary_emb(x, position[None], kind))
        if i in DROPS:
            norms = x[0].norm(dim=-1)
            norms[0] = float("inf")
            kept = norms.topk(max(1, n - int(n * DROPS[i]))).indices.sort().values
            before.append((x, kept))
            x, position = x[:, kept], position[kept]
    left = x
    for full, kept in reversed(before):
        full = full.clone()
        full[:, kept] = x
        x = full
    return base.final_norm(left)[0].detach(), base.final_norm(x)[0].detach()


def randomise(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif "embeddings" in name:
                p.copy_(torch.randn_like(p))
            elif p.dim() > 1:
                p.copy_(torch.randn_like(p) * (2.0 / p.shape[1]) ** 0.5)
            else:
                p.copy_(0.2 * torch.randn_like(p))
    return model.eval()


def published(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(folder + "/model.safetensors")


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, sort_keys=True, ensure_ascii=False)
        f.write("\n")


def make(name, model, tokenizer, layers, norm, seed, old_config=None, tokenizer_class="PreTrainedTokenizerFast"):
    """layers, norm: the modules of the encoder whose results are the states."""
    folder = f"{HERE}/{name}"
    os.makedirs(folder, exist_ok=True)
    model = randomise(model, seed)
    base = getattr(model, model.base_model_prefix, model)
    encoded = [tokenizer.encode(text) for text in TEXTS]
    states, logits = [[] for _ in range(len(layers(base)) + 1)], []
    now = []
    keep = lambda _module, _in, out: now.append((out[0] if isinstance(out, tuple) else out)[0])  # noqa: E731
    hooks = [module.register_forward_hook(keep) for module in [base.embeddings, *layers(base)]]

    def run(ids):
        now.clear()
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]))

    for e in encoded:
        out = run(e.ids)
        if norm is not None:
            now[-1] = norm(base)(now[-1]).detach()
        for i, x in enumerate(now):
            states[i].append(x.detach())
        if hasattr(out, "start_logits"):
            logits.append(torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1))
        elif "For" in type(model).__name__ and not type(model).__name__.endswith("MaskedLM"):
            logits.append(out.logits.reshape(-1, out.logits.shape[-1]))
    expected = {"ids": torch.tensor([i for e in encoded for i in e.ids]).int(), "lengths": torch.tensor([len(e.ids) for e in encoded]).int()}
    if logits:
        expected["logits"] = torch.cat(logits)
        if type(model).__name__.endswith("SequenceClassification"):
            expected["pair.logits"] = run(tokenizer.encode(TEXTS[1], TEXTS[2]).ids).logits
    else:
        expected |= {f"states.{i}": torch.cat(s) for i, s in enumerate(states)}
    for hook in hooks:
        hook.remove()
    if type(model).__name__ == "ModernBertForMaskedLM":
        with torch.no_grad():
            both = [dropped(base, e.ids) for e in encoded]
        expected |= {"dropped": torch.cat([b[0] for b in both]), "restored": torch.cat([b[1] for b in both])}
    config = model.config.to_dict()
    for key in ("transformers_version", "torch_dtype", "dtype", "_attn_implementation_autoset"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    if old_config:
        old_config(config)
    write_json(f"{folder}/config.json", config)
    tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
    write_json(f"{folder}/tokenizer_config.json", {"tokenizer_class": tokenizer_class, "model_max_length": 128})
    save_file({k: v.detach().clone().contiguous() for k, v in published(model).items()}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    save_file({k: v.detach().clone().contiguous() for k, v in expected.items()}, f"{folder}/expected.safetensors")
    print(folder, sum(os.path.getsize(f"{folder}/{f}") for f in os.listdir(folder)), "bytes,", sum(len(e.ids) for e in encoded), "tokens")


def before_5(config):
    """The settings of ModernBERT as they were first published."""
    rope = config.pop("rope_parameters")
    config["global_rope_theta"], config["local_rope_theta"] = rope["full_attention"]["rope_theta"], rope["sliding_attention"]["rope_theta"]
    config["global_attn_every_n_layers"] = 3
    del config["layer_types"]


def wordpiece():
    """Pieces that spell all of TEXTS but what is of other scripts."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set("".join(TEXTS).lower()) & set("abcdefghijklmnopqrstuvwxyz0123456789.,:;'"))
    whole = ["the", "quick", "##tion", "##en", "of", "in", "value", "to", "##ken"]
    tokens = special + letters + ["##" + c for c in letters] + whole
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[(t, vocab[t]) for t in ("[CLS]", "[SEP]")])
    return tokenizer


def main():
    import transformers as t

    vocab, merges = make_gpt2.trained()
    vocab, merges = {token: i for token, i in vocab.items() if i < 256 + MERGES}, merges[:MERGES]
    write_json(f"{HERE}/texts.json", TEXTS)
    small = dict(hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=128)

    tokenizer = make_gpt2.modernbert(vocab, merges)
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep")}
    modern = dict(**small, **ids, bos_token_id=ids["cls_token_id"], eos_token_id=ids["sep_token_id"], vocab_size=tokenizer.get_vocab_size(),
                  local_attention=17, attn_implementation="eager")
    layers, norm = (lambda base: base.layers), (lambda base: base.final_norm)
    labels = dict(id2label={i: f"label {i}" for i in range(3)}, label2id={f"label {i}": i for i in range(3)})
    make("modernbert", t.ModernBertForMaskedLM(t.ModernBertConfig(**modern, num_hidden_layers=4)), tokenizer, layers, norm, 1)
    make("modernbert-bare", t.ModernBertModel(t.ModernBertConfig(
        **modern, num_hidden_layers=3, norm_bias=True, attention_bias=True, mlp_bias=True, hidden_activation="silu",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}})), tokenizer, layers, norm, 2)
    make("modernbert-classifier", t.ModernBertForSequenceClassification(t.ModernBertConfig(**modern, **labels, num_hidden_layers=4)), tokenizer,
         layers, norm, 3, before_5)
    make("modernbert-mean", t.ModernBertForSequenceClassification(t.ModernBertConfig(
        **modern, **labels, num_hidden_layers=2, classifier_pooling="mean", classifier_bias=True, classifier_activation="relu",
        norm_bias=True)), tokenizer, layers, norm, 4)
    make("modernbert-tokens", t.ModernBertForTokenClassification(t.ModernBertConfig(**modern, **labels, num_hidden_layers=2)), tokenizer, layers,
         norm, 5)
    make("modernbert-answers", t.ModernBertForQuestionAnswering(t.ModernBertConfig(**modern, num_hidden_layers=2)), tokenizer, layers, norm, 6)

    tokenizer = make_gpt2.roberta(vocab, merges)
    roberta = dict(**{**small, "max_position_embeddings": 136}, vocab_size=tokenizer.get_vocab_size(), type_vocab_size=1, num_hidden_layers=2,
                   pad_token_id=7, bos_token_id=tokenizer.token_to_id("<s>"), eos_token_id=tokenizer.token_to_id("</s>"),
                   layer_norm_eps=1e-5, attn_implementation="eager")
    layers = lambda base: base.encoder.layer  # noqa: E731
    make("roberta", t.RobertaModel(t.RobertaConfig(**roberta)), tokenizer, layers, None, 7)
    make("roberta-classifier", t.RobertaForSequenceClassification(t.RobertaConfig(**roberta, **labels)), tokenizer, layers, None, 8)
    make("roberta-tokens", t.RobertaForTokenClassification(t.RobertaConfig(**roberta, **labels)), tokenizer, layers, None, 9)
    make("roberta-answers", t.RobertaForQuestionAnswering(t.RobertaConfig(**roberta)), tokenizer, layers, None, 10)

    tokenizer = wordpiece()
    distil = dict(vocab_size=tokenizer.get_vocab_size(), dim=32, n_heads=2, n_layers=2, hidden_dim=48, max_position_embeddings=128,
                  attn_implementation="eager")
    layers = lambda base: base.transformer.layer  # noqa: E731
    kind = dict(tokenizer_class="DistilBertTokenizer")
    make("distilbert", t.DistilBertForMaskedLM(t.DistilBertConfig(**distil)), tokenizer, layers, None, 11, **kind)
    make("distilbert-bare", t.DistilBertModel(t.DistilBertConfig(**distil, activation="relu", sinusoidal_pos_embds=True)), tokenizer, layers, None,
         12, **kind)
    make("distilbert-classifier", t.DistilBertForSequenceClassification(t.DistilBertConfig(**distil, **labels)), tokenizer, layers, None, 13,
         **kind)
    make("distilbert-tokens", t.DistilBertForTokenClassification(t.DistilBertConfig(**distil, **labels)), tokenizer, layers, None, 14, **kind)
    make("distilbert-answers", t.DistilBertForQuestionAnswering(t.DistilBertConfig(**distil)), tokenizer, layers, None, 15, **kind)


if __name__ == "__main__":
    sys.exit(main())

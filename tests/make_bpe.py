#!/usr/bin/env python3
"""Makes tests/data/bpe.json: a small tokenizer of CLIP's kind, and what the tokenizers library makes of texts.

  python3 -m venv env && env/bin/pip install tokenizers==0.23.3 && env/bin/pip install --no-deps open_clip_torch
  env/bin/python tests/make_bpe.py

The vocabulary is that of CLIP as far as the first 2,000 merges go (open_clip_torch carries the list of merges), in the order of ids
that OpenAI gave it: bytes, bytes that end a word, merges, <|startoftext|>, <|endoftext|>.
"""
import gzip
import importlib.util
import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

MERGES = 2000
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
SPECIAL_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|" + WORDS


def byte_characters():
    """The characters that stand for bytes 0 to 255, and the order in which CLIP numbers them."""
    seen = [b for b in range(256) if 33 <= b <= 126 or (161 <= b and b != 173)]
    unseen = [b for b in range(256) if b not in seen]
    return [chr(b) for b in seen] + [chr(256 + i) for i in range(len(unseen))]


def merges():
    package = pathlib.Path(importlib.util.find_spec("open_clip").origin).parent
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as f:
        return [tuple(line.split()) for line in f.read().split("\n")[1 : MERGES + 1]]


def make(words, normalized):
    pairs = merges()
    symbols = byte_characters()
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in pairs] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == len(tokens)
    t = Tokenizer(BPE(vocab=vocab, merges=pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
                      unk_token="<|endoftext|>"))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    eos, bos = (("<|endoftext|>", vocab["<|endoftext|>"]), ("<|startoftext|>", vocab["<|startoftext|>"]))
    t.post_processor = processors.RobertaProcessing(eos, bos, False, False)
    t.add_special_tokens([AddedToken("<|startoftext|>", normalized=normalized, special=True),
                          AddedToken("<|endoftext|>", normalized=False, special=True)])
    return t


HAND_MADE = [
    "", " ", "\t\r\n\u3000", "a photo of a cat", "A Photo of a CAT.", "Don't you're I've I'm we'll he'd it's",
    "DON'T YOU'RE I'VE WE'LL", "'s 't 're 've 'm 'll 'd ' 'r 'v 'l 'x 'rx 'ra 'la", "''s '-s -'s 's's 'll'll 'l'l", "'r 'v'", "'",
    "rock'n'roll o'clock 'tis 'twas 'em", "'\u0301s '\u0338t 's\u0301 're\u0301 'r\u0301e 'l\u200dl", "it\u2019s don\u2019t",
    "2024-11-26 12:34:56.789", "1234567890", "\u00bd\u2167\u0664\u0665\U0001d7d9 3rd x2", "$1,234.56 (50%) \u2014 e=mc\u00b2",
    "caf\u00e9 cafe\u0301 CAF\u00c9 e\u0323\u0301 e\u0301\u0323 \u1ed9 o\u0323\u0302 o\u0302\u0323", "\u212b \u2126 \u212a \u0344 \u0f73\u0f71",
    "q\u0307\u0323\U0001d165\u0334x\u0301", "\u0301a \u0301\u0302", "=\u0338 <\u0338 >\u0338 \u2260 \u226e", "\u037e\u1fef",
    "\u0130stanbul \u0131 \u0130\u0307 \u1e9e \u00df \u03a3\u0399\u03a3 \ufb01 \u01c5", "\u0958 \u0f43 \u2adc \ufb1d \u0915\u093c",
    "\u1100\u1161\u11a8 \uac01 \u1100\u1161 \uac00\u11a8 \u1161\u11a8 \u1112\u1161\u11ab\u1100\u116e\u11a8",
    "\u09c7\u09be \u09c7\u09d7 \u0bc6\u0bbe \u0d46\u0d57 \u1025\u102e \U00011131\U00011127", "\u304b\u3099 \u30cf\u309a \u304c",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002", "\u4e2d\u6587\u3002english\u6587\u5b57", "\uf900 \U0002f800",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0419 \u0418\u0306",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea 1\ufe0f\u20e3 \u2764\ufe0f \U0001f44d\U0001f3fd!!",
    "a\u0000b\u0001c\u007fd\u0085e\u200bf\ufefff\ufffdg\u00adh", "a\tb\u000bc\u000cd\u001ce\u00a0f\u1680g\u2003h\u2028i\u202fj\u205fk\u180el",
    "<|endoftext|>", "<|startoftext|>a<|endoftext|>b", "a <|endoftext|>\u0301 b", "<|ENDOFTEXT|>", "<|ENDOFTEXT|>>> <|EndOfText|>|",
    "x<|ENDOFTEXT|>y -<|ENDOFTEXT|>- <|ENDOFTEXT|><|STARTOFTEXT|>>", "<|STARTOFTEXT|>>> <|startoftext|>>>", "<|STARTOFTEXT |> <|endoftex|>>",
    "<|\u0301ENDOFTEXT|>> <| endoftext|>>", "<|endoftext", "</w> a</w> in</w>", "!!! ?!?! ... ---- ~~~~ @#$%^&*() [] {} \\ / |",
    "https://example.org/a_b?c=d&e=%20 user@mail.com #tag_1", "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 47, "x" * 48, "x" * 49, "ab" * 40, "the" * 30, "in" * 24 + "g", "\u00e9" * 24, "\u00e9" * 25 + "a", "-" * 100, "=" * 33 + ">",
    "\ue000 \U000f0000 \u0378 \U000e0fff \U0010ffff", "\u1c89 \ua7cb\ua7dc \U00010d50 \U00016ea0 \U000113c2\U000113c9",
    "\U00010940\U00016ff4\U00011f50\U0001ccf0\U00031350\U000323b0", "\u1734\U0001171e\u1abf \U000111c9\u166d",
]


def random_texts():
    rng = random.Random(1)
    parts = ["'s", "'LL", "'re", "'", " ", "  ", "the", "Photo", "ing", "\u0301", "\u0323", "\u00e9", "\u0130", "7", "<|endoftext|>",
             "<|EndOfText|>", ">", "<|", "\u304b", "\u3099", "\U0001f600", "\u200d", "\u4e2d", "\x00", "\u00a0"]
    blocks = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x900, 0xD7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF),
              (0x2000, 0x206F), (0xAC00, 0xAC80), (0x10000, 0x1FFFF)]
    for _ in range(150):
        text = ""
        for _ in range(rng.randrange(2, 14)):
            text += rng.choice(parts) if rng.random() < 0.6 else chr(rng.randint(*rng.choice(blocks)))
        yield text


def row(t, text):
    """Ids, and spans in bytes."""
    e = t.encode(text, add_special_tokens=False)
    at = [0]
    for c in text:
        at.append(at[-1] + len(c.encode()))
    return {"ids": e.ids, "spans": [at[x] for span in e.offsets for x in span]}


def main():
    plain, special = make(WORDS, True), make(SPECIAL_WORDS, False)
    texts = HAND_MADE + list(random_texts())
    rows = []
    for text in texts:
        r = {"text": text, **row(plain, text)}
        other = row(special, text)
        if other != {k: r[k] for k in other}:
            r["special"] = other
        rows.append(r)
    wrapped = plain.encode("a photo", "of it")
    plain.enable_truncation(8)
    cut = plain.encode("a photo of a cat and 2024 dogs")
    plain.no_truncation()
    tokenizer = json.loads(plain.to_str())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]  # half the size
    out = {"about": "made by tests/make_bpe.py", "tokenizer": tokenizer, "special_words": SPECIAL_WORDS,
           "pair": {"ids": wrapped.ids, "type_ids": wrapped.type_ids}, "cut": cut.ids, "rows": rows}
    path = pathlib.Path(__file__).parent / "data" / "bpe.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes,", len(rows), "texts,", sum("special" in r for r in rows), "by their own rules")


if __name__ == "__main__":
    main()

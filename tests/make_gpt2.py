#!/usr/bin/env python3
"""Makes tests/data/gpt2.json: small tokenizers of GPT-2's kind, and what the tokenizers library makes of texts.

  python3 -m venv env && env/bin/pip install tokenizers==0.23.3 && env/bin/python tests/make_gpt2.py

All have the same vocabulary, trained on the sentences below: all bytes, then merges.  They differ as those of ModernBERT, RoBERTa and
a third that has the settings which neither has.
"""
import json
import pathlib
import random

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCABULARY = 700

SENTENCES = """
The quick brown fox jumps over the lazy dog, and the dog doesn't mind. It's been there since 1999; it'll be there in 2024.
I've seen what you're doing: they'd rather we'd not. She said "I'm fine", didn't she? The committee of inquiry looked at it.
How do I reset my password? I forgot my login and can't get into my account.  Interest rates rose by 0.5 % to 3.25 %.
def tokenize(text):
    # two words    and four spaces
    return [word for word in text.split() if word]

	tabs	between		columns
A caf\u00e9 in M\u00fcnchen, na\u00efve r\u00e9sum\u00e9s \u2014 and \u201cquotes\u201d. \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002
This is the house that the people who were there built for those that came after them, with what they had, where it stood.
Attention of the queries over the keys is a sum of the values; the position of a token turns it, and a window ends what it sees.
"""

HAND_MADE = [
    "", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", " \t ", "\u00a0", " \u00a0", "\u3000\u3000", "a", " a", "  a", "   a", "a ", "a  ", "a   b",
    "a\nb", "a\n\nb", "a \nb", "a\n b", "a \n b", "a\t b", "a\u00a0b", "a \u00a0b", "a\u00a0 b", "a\u3000\u3000b", " \n\n  x", "x\r\n\r\ny", "  \u2003 z",
    "The quick brown fox", " The  quick   brown    fox     ", "Hello\n\n\n  world\n", "    return [word for word in text]\n\n\tx",
    "don't DON'T Don'T you're YOU'RE we'll they've I'm he'd it's 'tis", " 's 't 're", "'s", "''s", "'s's", "x's 's x 's", " 'll'll", "' s", "'x 'r 'v 'l",
    "'re' 've' 'll' 'rest 'very 'lllama", "!'s !'ll (it's)", "it\u2019s don\u2019t", "1's 2'll \u00bd's", "'\u0301s '\u00a0s",
    "1999 2024 3.25 1,234.56 x2 2x 10th 1a2b3c", "12345678901234567890", "\u00bd\u2167\u0664\u0665\U0001d7d9 3rd", " 1  2   3",
    "a_b-c.d,e;f:g!h?i", "...---___***", " !  ??   ...", "$ % ^ & * ( ) [ ] { } < > / \\ | ~ ` @ # + =", "https://example.org/a_b?c=d&e=%20",
    "caf\u00e9 cafe\u0301 CAF\u00c9 e\u0323\u0301 e\u0301\u0323 \u1ed9 o\u0323\u0302 o\u0302\u0323", "\u212b \u2126 \u212a \u0344", " \u0301x \u0301", "=\u0338 <\u0338 \u2260", "\u037e\u1fef",
    "\u1100\u1161\u11a8 \uac01 \u1100\u1161 \uac00\u11a8", "\u304b\u3099 \u30cf\u309a \u304c", "\u0958 \u0f43 \u2adc \ufb1d",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 1\ufe0f\u20e3 \u2764\ufe0f", "a\u0000b\u0001c\u007fd\u0085e\u200bf\ufefff\ufffdg\u00adh", "a\u000bb\u000cc\u001cd\u1680e\u2028f\u2029g\u202fh\u205fi\u180ej",
    "[MASK]", " [MASK]", "a [MASK] b", "a[MASK]b", "a  [MASK]  b", "\n[MASK]\n", "[CLS] a [SEP]", "[mask] [ MASK]", "<mask> a  <mask>b<s></s>", "<pad><unk>",
    "\u0120a \u010a \u0120", "[MASK]'s", "'[MASK]s", "[MASK]\u0301", "\u0301[MASK]", "|||IP_ADDRESS|||", "||||IP_ADDRESS|||| a|||IP_ADDRESS|||b", "x\u3000[MASK]\u3000y",
    "in   out    of     it", "the" * 30, "x" * 100, "\u00e9" * 30, " " * 40 + "x" + " " * 40, "=" * 50, "9" * 60,
    "\ue000 \U000f0000 \u0378 \U0010ffff", "\u1c89 \ua7cb\ua7dc \U00010d50 \U00016ea0 \U000113c2", "\U00011f50\U0001ccf0\U00031350\U000323b0",
]


def random_texts():
    rng = random.Random(2)
    parts = ["'s", "'LL", "'re", "'", " ", " ", "  ", "   ", "\n", "\t", "the", " The", "ing", "\u0301", "\u00e9", "7", "42", "[MASK]", "<mask>", "|||IP_ADDRESS|||",
             "\u304b", "\u3099", "\U0001f600", "\u200d", "\u4e2d", "\x00", "\u00a0", "\u3000", "...", "\u0120"]
    blocks = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x900, 0xD7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F),
              (0xAC00, 0xAC80), (0x10000, 0x1FFFF)]
    for _ in range(150):
        text = ""
        for _ in range(rng.randrange(2, 14)):
            text += rng.choice(parts) if rng.random() < 0.75 else chr(rng.randint(*rng.choice(blocks)))
        yield text


def trained():
    t = Tokenizer(BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator(SENTENCES.split("\n"), BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                                             show_progress=False))
    model = json.loads(t.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def special(content, **flags):
    return AddedToken(content, special=True, **{"normalized": False, **flags})


def plain(vocab, merges, **options):
    t = Tokenizer(BPE(vocab=vocab, merges=merges, **options))
    t.decoder = decoders.ByteLevel()
    return t


def modernbert(vocab, merges):
    t = plain(vocab, merges)
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)] + [AddedToken("|||IP_ADDRESS|||", normalized=True)])
    t.add_special_tokens([special("[UNK]"), special("[CLS]"), special("[SEP]"), special("[PAD]"), special("[MASK]", lstrip=True)])
    t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
                                                     special_tokens=[(s, t.token_to_id(s)) for s in ("[CLS]", "[SEP]")])
    return t


def roberta(vocab, merges):
    t = plain(vocab, merges)
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_special_tokens([special(s, normalized=True) for s in ("<s>", "<pad>", "</s>", "<unk>")] + [special("<mask>", lstrip=True)])
    t.post_processor = processors.RobertaProcessing(("</s>", t.token_to_id("</s>")), ("<s>", t.token_to_id("<s>")), trim_offsets=True,
                                                    add_prefix_space=False)
    return t


def other(vocab, merges):
    """A space before every text, words that are tokens whatever their merges make of them, and a mask that takes what is behind it."""
    keep = merges[: len(merges) // 2]
    t = plain(vocab, keep, ignore_merges=True)
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.add_special_tokens([special("[CLS]"), special("[SEP]"), special("[MASK]", rstrip=True)])
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True, add_prefix_space=True),
        processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                      special_tokens=[(s, t.token_to_id(s)) for s in ("[CLS]", "[SEP]")])])
    return t


def row(t, text):
    """Ids, and spans in bytes."""
    e = t.encode(text, add_special_tokens=False)
    at = [0]
    for c in text:
        at.append(at[-1] + len(c.encode()))
    return [e.ids, [at[x] for span in e.offsets for x in span]]


def main():
    vocab, merges = trained()
    texts = HAND_MADE + list(random_texts())
    out = {"about": "made by tests/make_gpt2.py", "texts": texts, "model": None, "kinds": {}}
    for make in (modernbert, roberta, other):
        t = make(vocab, merges)
        tokenizer = json.loads(t.to_str())
        model = tokenizer.pop("model")
        if out["model"] is None:
            model["merges"] = [" ".join(pair) for pair in model["merges"]]
            out["model"] = model
        pair = t.encode("a photo", "of it")
        out["kinds"][make.__name__] = {
            "tokenizer": tokenizer, "merges": len(model["merges"]), "ignore_merges": model["ignore_merges"],
            "pair": {"ids": pair.ids, "type_ids": pair.type_ids}, "rows": [row(t, text) for text in texts]}
    path = pathlib.Path(__file__).parent / "data" / "gpt2.json"
    path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes,", len(texts), "texts")


if __name__ == "__main__":
    main()

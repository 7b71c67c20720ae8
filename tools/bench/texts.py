"""Texts of the data sets that tools/bench-peers and tools/results measure with."""


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        texts = [s.rstrip("\r\n") for s in f]
    texts = [s for s in texts if s.strip()]
    if not texts:
        raise ValueError("%s: no line with a text" % path)
    return texts


def read_stsb(path):
    """The sentences of STS-B in their order, each once."""
    texts = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) < 7:
                raise ValueError("%s:%d: expected 7 columns with tabs between them, got %d" % (path, number, len(cells)))
            texts.update(dict.fromkeys(cells[5:7]))
    return list(texts)


def read_cranfield(path):
    """The abstracts (.W) of the Cranfield collection."""
    texts, field = [], None
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if line[:2] in (".I", ".T", ".A", ".B", ".W"):
                field = line[:2]
                if field == ".I":
                    texts.append([])
            elif field == ".W":
                texts[-1].append(line.strip())
    texts = [t for t in (" ".join(words) for words in texts) if t]
    if not texts:
        raise ValueError("%s: no document with a .W" % path)
    return texts

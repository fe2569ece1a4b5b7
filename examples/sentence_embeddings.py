"""Prune a sentence-transformers model in one shot on your own sentences, save it sparse and compare the embeddings.

python examples/sentence_embeddings.py sentence-transformers/all-MiniLM-L6-v2 sentences.txt --out sparse
"""

import argparse
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

import sparseprune as sp


def prune(name: str, sentences: list[str], out: str, sparsity: float = 0.5) -> float:
    """name: a hub name or a folder; sentences: what to calibrate on; out: the folder for the sparse model. Returns the
    mean cosine between the embeddings of the dense model and those of the folder.
    """
    model = SentenceTransformer(name, device="cpu")
    dense = torch.tensor(model.encode(sentences))
    batches = [dict(model.tokenize(sentences[i : i + 32])) for i in range(0, len(sentences), 32)]
    reader = model[0].auto_model  # the transformers model inside, which the batches are the inputs of
    inputs = [{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in batches]
    sp.prune_(reader, sparsity, criterion="sparsegpt", data=inputs)
    print(sp.sparsify_(model, tokens=1024))
    model.save(out)
    again = SentenceTransformer(out, device="cpu")  # by transformers' registry, after import sparseprune
    return float(torch.cosine_similarity(torch.tensor(again.encode(sentences)), dense).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("sentences", help="a text file, a sentence a line")
    parser.add_argument("--out", default="sparse")
    given = parser.parse_args()
    lines = [line.strip() for line in Path(given.sentences).read_text(encoding="utf-8").splitlines() if line.strip()]
    print(f"mean cosine to the dense embeddings: {prune(given.name, lines, given.out):.4f}")

"""Prune MiniLM-L6 (a hub name, or a folder that holds the model) to one tenth of its weights on your own files.

python examples/prune_minilm.py sentence-transformers/all-MiniLM-L6-v2 train.tsv dev.tsv test.tsv
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparseprune as sp

name, *files = sys.argv[1:]
data = sp.data.load_files(*files)
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(data.label_names))


def loader(split: sp.data.Examples, training: bool) -> sp.data.TokenLoader:
    ids = [tokenizer(*text, truncation=True, max_length=64)["input_ids"] for text in split.texts]
    return sp.data.TokenLoader(ids, split.labels, 32, training, pad_id=tokenizer.pad_token_id)


train, valid = loader(data.train, True), loader(data.valid, False)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
for epoch in range(3):  # the teacher first: the dense model on this task
    train.set_epoch(epoch)
    for batch in train:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

config = sp.DistillConfig(density=0.1, epochs=5, lr=2e-4)
pruner = sp.DistillPruner(model, config)
pruner.fit(train, valid)
model = pruner.finalize().eval()
print(sp.sparsify_(model, tokens=1024))  # nn.Linear -> SparseLinear where it pays on this machine
sp.save(model, "minilm-pruned.safetensors")
print(sp.sparsity_report(model))

"""LoRA on a causal language model that was pruned in one shot and runs sparse; merged without losing a zero.

python examples/lora_on_pruned.py HuggingFaceTB/SmolLM2-135M text.txt --out adapted
"""

import argparse
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparseprune as sp


def adapt(
    name: str, text: str, out: str, sparsity: float = 0.5, length: int = 128, steps: int = 50
) -> dict[str, float]:
    """name: a hub name or a folder; text: a file to calibrate and train on; out: the folder for the merged model.
    Returns the loss before and after training, and after merging.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // length * length].view(-1, length)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    sp.prune_(model, sparsity, criterion="wanda", data=windows[:32].split(4))
    sp.sparsify_(
        model, layout="csr", fuse=False
    )  # every pruned layer; layout="auto" leaves dense what dense runs faster

    adapters = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters)  # the base is frozen and stays sparse
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=rows, labels=rows).loss

    with torch.no_grad():
        before = float(loss(windows[:4]))
    for step in range(steps):
        at = step * 4 % max(1, len(windows) - 3)
        optimiser.zero_grad()
        loss(windows[at : at + 4]).backward()
        optimiser.step()
    with torch.no_grad():
        after = float(loss(windows[:4]))

    model = model.merge_and_unload()  # the adapters become the layers' low-rank terms: exact, and the zeros stay
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with torch.no_grad():
        merged = float(loss(windows[:4]))
    return {"before": before, "after": after, "merged": merged}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("text")
    parser.add_argument("--out", default="adapted")
    given = parser.parse_args()
    print(adapt(given.name, given.text, given.out))

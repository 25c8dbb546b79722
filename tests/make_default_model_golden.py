"""Makes tests/goldens_default_model.npz: what transformers, under torch, says of the models that ship. Run where they are.

python tests/make_default_model_golden.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
TEXT = "Once upon a time, there was a dog who had a red kite."
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 2 + 3?"}]


def main() -> None:
    kept = {}
    for name in ("default", "draft"):
        folder = ROOT / "jaxllm" / f"{name}_model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = tokenizer(TEXT)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
        kept |= {f"{name}_ids": np.array(ids), f"{name}_logits": logits[-3:].numpy(), f"{name}_chat": np.array(chat)}
        print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0]))
    np.savez_compressed(Path(__file__).parent / "goldens_default_model.npz", **kept)


if __name__ == "__main__":
    main()

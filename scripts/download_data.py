"""Fetches the text a run trains on: `python scripts/download_data.py --source tiny`."""

import sys
from pathlib import Path

import tyro

from minigpt.config import SourceName
from minigpt.corpus import CorpusError, load_corpus


def main(source: SourceName = "tiny", out_dir: Path = Path("data")) -> None:
    """Fetches Shakespeare unless it is there already, and prints what it got.

    Args:
        source: Tiny Shakespeare (1.1 MB), or the complete plays (4.7 MB).
        out_dir: the folder that keeps the text.
    """
    try:
        corpus = load_corpus(source, out_dir)
    except CorpusError as error:
        sys.exit(f"error: {error}")
    print(f"path        {corpus.path}")
    print(f"characters  {len(corpus.text):,}")
    print(f"symbols     {len(set(corpus.text))}")
    print(f"lines       {len(corpus.text.splitlines()):,}")
    print(f"SHA-256     {corpus.sha256}")
    print(f"source      {corpus.source}")


if __name__ == "__main__":
    tyro.cli(main)

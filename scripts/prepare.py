"""Make tokens of texts of any size: `python scripts/prepare.py texts/ --out-dir data/mine --vocab-size 8192`."""

from minigpt.cli import prepare

if __name__ == "__main__":
    prepare()

"""Write a trained model for other programs: `python scripts/export.py runs/quick --to hf`."""

from minigpt.cli import export

if __name__ == "__main__":
    export()

"""Write verse with a trained model: `python scripts/generate.py --prompt "ROMEO:" --max-tokens 200`."""

from minigpt.cli import generate

if __name__ == "__main__":
    generate()

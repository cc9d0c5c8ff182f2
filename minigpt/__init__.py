"""minigpt: a GPT on tinytensor, trained on Shakespeare."""

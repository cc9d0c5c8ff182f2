"""A trained model as files for other programs, and the command that writes them."""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinytensor as tt
from minigpt import checkpoint, folder, gpt2
from minigpt.checkpoint import BEST, LAST
from minigpt.curve import plot
from minigpt.export import card, write_folder
from tests.minigpt.program import call, refused
from tests.minigpt.small import TINY, trainer, verse
from tests.minigpt.torch_gpt import ids

FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(name="run")
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    made = trainer(run)
    made.val_loss = made.evaluate()
    made.save()
    return run


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_a_run_becomes_a_folder_that_transformers_reads(run: Path) -> None:
    before = names(run)
    out = write_folder(run)
    assert (out, names(out), names(run)) == (run / "hf", FILES, sorted([*before, "hf"]))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    saved = checkpoint.load_run(run)
    prompt = saved.tokenizer.encode("ANNA:")[None]
    with tt.no_grad():
        expected = saved.build_model()(prompt)[0].numpy()
    found = AutoModelForCausalLM.from_pretrained(out)(ids(prompt)).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out)("ANNA:")["input_ids"] == prompt[0].tolist()


def test_a_checkpoint_file_is_exported_as_it_is(run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(run / LAST)
    weights = {name: a + 1 for name, a in saved.model.items()}
    checkpoint.save(run / BEST, replace(saved, model=weights))
    (tmp_path / "empty").mkdir()
    last, best = write_folder(run / LAST, out=tmp_path / "empty"), write_folder(run, out=tmp_path / "new" / "deep")
    assert (gpt2.load(last).weights["wte.weight"] == saved.model["wte.weight"]).all()
    assert (gpt2.load(best).weights["wte.weight"] == weights["wte.weight"]).all()
    assert write_folder(run / LAST) == run / "hf"


def test_nothing_is_overwritten_or_left_half(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out is there already; choose another folder with --out-dir"):
        write_folder(run, out=out)
    with pytest.raises(ValueError, match=r"mine\.txt is there already"):
        write_folder(run, out=out / "mine.txt")
    with pytest.raises(OSError, match=r"could not be written"):
        write_folder(run, out=out / "mine.txt" / "below")
    before = names(run)
    for error in (OSError("no space left"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("minigpt.export.card", fail)
        with pytest.raises(type(error)):
            write_folder(run)
        assert (names(run), names(out)) == (before, ["mine.txt"])

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"new could not be written \(No space left .*\); choose another folder with --out-dir"):
        write_folder(run, out=tmp_path / "new")


def test_the_card_says_what_is_known(run: Path) -> None:
    saved = checkpoint.load_run(run)
    metrics = run / folder.METRICS
    metrics.touch()
    plot(metrics, run / folder.CURVE, "a run")
    sha256 = hashlib.sha256(verse().encode()).hexdigest()
    folder.write_record(
        run, {"text": {"source": "a|b <i> $x$"}, "commit": "0123abcd", "versions": {"python": "3.12.1", "numpy": "2.4"}}
    )
    out = write_folder(run)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert (out / folder.CURVE).read_bytes() == (run / folder.CURVE).read_bytes()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n- minigpt\n---\n\n")
    for line in (
        "# tiny",
        f"| validation loss | {saved.val_loss:.4f} nats per token |",
        "| step | 0 of 6 |",
        r"| text | a\|b \<i\> \$x\$ |",
        f"| SHA-256 of the text | {sha256} |",
        "| versions | python 3.12.1, numpy 2.4 |",
        "| commit | 0123abcd |",
        "| block\\_size | 8 |",
        "| lr | 0.01 |",
        "![Loss, learning rate and gradient norm, step by step](curve.png)",
    ):
        assert f"\n{line}\n" in text
    assert str(run) not in text


def test_the_card_leaves_out_what_is_not_known(run: Path) -> None:
    saved = checkpoint.load_run(run)
    for record in ({}, {"text": None, "versions": "1", "commit": None}):
        text = card(replace(saved, val_loss=float("inf"), config=replace(TINY, preset="# a\n|b|")), record, curve=False)
        assert "# \\# a \\|b\\|\n" in text
        assert "| validation loss | not measured |" in text
        assert "commit" not in text
        assert "versions" not in text
        assert "curve.png" not in text
        assert "None" not in text


def test_the_code_of_the_card_runs(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(write_folder(run))
    theirs, ours = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    (opening,) = re.findall(r'tokenizer\("(.*?)", return_tensors', theirs)
    for block, length in ((theirs, TINY.block_size), (ours, len(opening) + 300 + 1)):
        exec(block, {})
        text = capsys.readouterr().out.removesuffix("\n")
        assert text.startswith(opening)
        assert len(text) == length


def test_the_commands_write_a_folder_and_speak_with_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    call(monkeypatch, "export.py", "run", "--to", "hf", "--out-dir", "my model")
    assert capsys.readouterr().out.endswith("to hear it: python scripts/generate.py --model 'my model'\n")
    wanted = ["--prompt", "ANNA:", "--max-tokens", 20, "--temperature", 0]
    call(monkeypatch, "generate.py", "--run", "run", *wanted)
    from_run = capsys.readouterr().out
    call(monkeypatch, "generate.py", "--model", "my model", *wanted)
    assert capsys.readouterr().out == from_run
    assert len(from_run) == len("ANNA:") + 20 + 1
    call(monkeypatch, "generate.py", "--model", "my model", *wanted, "--explain", "page.html")
    assert "my model" in Path("page.html").read_text(encoding="utf-8")


def test_the_commands_refuse_in_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert refused(monkeypatch, "export.py", "none").startswith("error: none holds no checkpoint")
    write_folder(run, out=Path("hf"))
    assert refused(monkeypatch, "export.py", "run", "--out-dir", "hf").startswith("error: hf is there already")
    both = refused(monkeypatch, "generate.py", "--run", "run", "--model", "hf")
    assert both == "error: --run run and --model hf are two models; leave out one of them"
    os.remove("hf/tokenizer.json")
    assert refused(monkeypatch, "generate.py", "--model", "hf").startswith("error: hf has no tokenizer; put its tokenizer.json")

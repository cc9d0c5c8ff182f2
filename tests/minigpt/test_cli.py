"""The scripts as a user runs them."""

import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors import safe_open

from minigpt import __version__
from minigpt.checkpoint import LAST, Checkpoint, load
from minigpt.config import PRESETS, TrainConfig
from minigpt.sampling import Sampling, speak
from minigpt.tracking import read_metrics
from minigpt.trainer import Trainer
from tests.minigpt.program import call, command, environment, execute, printed, refused
from tests.minigpt.small import verse

SMALL = (
    "--data verse.txt --no-wandb --n_layer 1 --n-embd=16 --n_head 2 --block_size=8 --micro-batch 4 --max_steps 4 "
    "--eval-interval 2 --warmup_steps 1 --sample-tokens 10 --lr 1e-3"
)
SHORT = SMALL.split()


@pytest.fixture(name="home", scope="module")
def home_with_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and the run that scripts/train.py made of it."""
    home = tmp_path_factory.mktemp("home")
    (home / "verse.txt").write_text(verse(), encoding="utf-8")
    done = execute(home, "train.py", "quick", *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "validation loss" in done.stdout
    assert "runs/quick" in done.stdout
    return home


@pytest.fixture(name="trained")
def checkpoint_of_the_run(home: Path) -> Checkpoint:
    return load(home / "runs" / "quick" / LAST)


def test_training_takes_flags_with_dashes_and_underscores(home: Path, trained: Checkpoint) -> None:
    config = trained.config
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size, config.micro_batch) == (1, 16, 2, 8, 4)
    assert (config.max_steps, config.eval_interval, config.warmup_steps, config.sample_tokens) == (4, 2, 1, 10)
    assert (config.preset, config.min_lr, config.dropout) == ("quick", PRESETS["quick"].min_lr, 0.0)
    assert {p.name for p in (home / "runs" / "quick").iterdir()} == {
        "last.safetensors",
        "best.safetensors",
        "previous.safetensors",
        "metrics.jsonl",
        "run.json",
        "run.lock",
        "curve.png",
        "samples",
    }


def test_a_run_tells_the_version(home: Path) -> None:
    run = home / "runs" / "quick"
    assert json.loads((run / "run.json").read_text())["versions"]["minigpt"] == __version__
    with safe_open(run / LAST, framework="numpy") as file:
        assert json.loads(file.metadata()["minigpt"])["versions"]["minigpt"] == __version__


def test_resuming_takes_every_flag_that_is_given(tmp_path: Path, home: Path) -> None:
    """One that repeats the preset's default included: the run's own setting was another."""
    (tmp_path / "verse.txt").write_text(verse(), encoding="utf-8")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / LAST).write_bytes((home / "runs" / "quick" / LAST).read_bytes())
    done = execute(tmp_path, "train.py", "--resume", "--out-dir", "mine", "--max-steps", "6", "--lr", "3e-4")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumed at step 4" in done.stdout
    config = load(folder / LAST).config
    assert (config.lr, config.max_steps, config.eval_interval) == (PRESETS["shakespeare"].lr, 6, 2)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [5, 6]
    assert "--run mine --prompt" in done.stdout  # the newest run below runs/ would be another


def test_help_explains_every_setting(tmp_path: Path) -> None:
    done = execute(tmp_path, "train.py", "nanogpt-char", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in PRESETS:
        assert name in done.stdout
    for field in fields(TrainConfig):
        flag = field.name.replace("_", "-")
        (line,) = re.findall(rf"│ --{flag}[ ,].*\n.*", done.stdout)  # a long flag's text begins a line later
        words = re.sub(rf"--(no-)?{flag},?|\(default: .*?\)|\{{.*?\}}|[A-Z|│]+ ", "", line)
        assert len(words.split()) >= 2, line
    assert "(default: 5000)" in done.stdout  # the settings of the preset that was named
    assert not list(tmp_path.iterdir())


def test_generating_continues_the_prompt_with_the_newest_run(home: Path, trained: Checkpoint) -> None:
    done = execute(
        home, "generate.py", "--prompt", "ANNA:\n", "--max_tokens", "20", "--num-samples", "3", "--top-k", "5", "--seed=2"
    )
    expected = "".join(speak(trained.build_model(), trained.tokenizer, "ANNA:\n", 20, 3, Sampling(top_k=5, seed=2)))
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert done.stdout.count("---\n") == 2


def test_a_prompt_comes_from_standard_input(home: Path) -> None:
    done = execute(
        home, "generate.py", "--run", "runs/quick/last.safetensors", "--prompt", "-", "--max-tokens", "4", stdin="ZOË:\nMy"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ZOË:\nMy")
    assert len(done.stdout) == len("ZOË:\nMy") + 4 + 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.txt", "error: cannot read none.txt (No such file or directory): name a UTF-8 text"),
        ("runs", "error: cannot read runs (Is a directory): name a UTF-8 text"),
        ("runs/quick/curve.png", "error: runs/quick/curve.png is not UTF-8 (byte 0x89 at offset 0): name a UTF-8 text"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    monkeypatch.chdir(home)
    assert refused(monkeypatch, "generate.py", "--prompt-file", name) == told


def test_two_prompts_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    told = refused(monkeypatch, "generate.py", "--prompt", "ANNA:", "--prompt-file", "verse.txt")
    assert told == "error: --prompt 'ANNA:' and --prompt-file verse.txt are two prompts; leave out one of them"


def test_a_prompt_comes_from_a_file(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "prompt.txt").write_text("BERT:\nA naïve cat", encoding="utf-8")
    monkeypatch.chdir(home)
    call(monkeypatch, "generate.py", "--prompt-file", "prompt.txt", "--max-tokens", 3, "--temperature", 0)
    written = capsys.readouterr().out
    assert written.startswith("BERT:\nA naïve cat")
    assert len(written) == len("BERT:\nA naïve cat") + 3 + 1


def test_an_error_is_one_line_on_standard_error(home: Path) -> None:
    done = execute(home, "generate.py", "--prompt", "ANNA: 7")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: character '7' (U+0037) at position 6 is not in the model's vocabulary")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--run", "none"], r"none holds no checkpoint"),
        (["--run", "verse.txt"], r"verse\.txt cannot be read as a checkpoint"),
        (["--max-tokens=-1"], r"max_tokens=-1 must not be negative"),
        (["--num-samples", "0"], r"num_samples=0 must be at least 1"),
    ],
)
def test_generating_refuses_in_one_line(home: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str) -> None:
    monkeypatch.chdir(home)
    assert re.match(f"error: .*{message}", refused(monkeypatch, "generate.py", *args))


def test_without_a_run_the_message_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(monkeypatch, "generate.py")
    assert message.startswith("error: no run with a checkpoint below runs/; train one with: python scripts/train.py quick")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "none.txt"], r"cannot read none\.txt .*name a UTF-8 text"),
        ([*SHORT, "--out-dir", "runs/quick"], r"runs/quick already holds a run; continue it with --resume"),
        ([*SHORT, "--out-dir", "verse.txt"], r"verse\.txt"),
        ([*SHORT, "--out-dir", "verse.txt/below"], r"verse\.txt/below"),
        ([*SHORT, "--block-size", "99999"], r"the text has \d+ tokens"),
        (["--resume", "--n-embd", "32", "--n-layer", "2"], r".*quick cannot go on .*n_layer 1 → 2, n_embd 16 → 32"),
        (["--resume", "--data", "other.txt"], r"trained on another text than other\.txt"),
        (["--preset", "shakespeare"], r"--preset only names a run; .*train\.py shakespeare"),
        (["--resume", "--out-dir", "none"], r"none holds no checkpoint to resume; leave out --resume"),
    ],
)
def test_training_refuses_in_one_line(home: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str) -> None:
    monkeypatch.chdir(home)
    Path("other.txt").write_text(verse(seed=1), encoding="utf-8")
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    assert re.match(f"error: .*{message}", refused(monkeypatch, "train.py", "quick", *args))
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before


def test_an_unknown_preset_is_named_with_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(monkeypatch, "train.py", "quik")
    assert message.startswith("error: preset 'quik' is not known; choose quick, shakespeare")


@pytest.mark.parametrize("args", [["--n-head", "5"], ["--dropout", "2"], ["--lr", "fast"], ["--source", "sonnets"]])
def test_wrong_flags_are_explained_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "train.py", *args)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert args[-1] in told.out + told.err
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_starting_is_one_line(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", interrupted)
    monkeypatch.chdir(home)
    message = refused(monkeypatch, "train.py", "quick", *SHORT, "--out-dir", tmp_path / "new")
    assert message == "interrupted before the first step"


def test_a_reader_may_leave_early(home: Path) -> None:
    args = command("generate.py", "--prompt", "ANNA:\n", "--max-tokens", "100000")
    with subprocess.Popen(args, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ANNA:\n"
        process.stdout.close()
        _, errors = process.communicate(timeout=30)
    assert errors == b""


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text(verse(), encoding="utf-8")
    args = command("train.py", "quick", *SHORT)
    with subprocess.Popen(args, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    assert load(tmp_path / "runs" / "quick" / LAST).step == 4


def test_importing_minigpt_is_light() -> None:
    heavy = ("matplotlib", "rich", "wandb", "tyro", "torch", "safetensors", "cupy")
    assert printed(f"import minigpt, sys; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_the_text_is_downloaded_by_a_script_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny_shakespeare.txt").write_text(verse(), encoding="utf-8")  # so that nothing is fetched
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "download_data.py", "--source", "tiny", "--out-dir", "data")
    told = capsys.readouterr().out
    assert f"characters  {len(verse()):,}" in told
    assert "not the published text (edited?)" in told

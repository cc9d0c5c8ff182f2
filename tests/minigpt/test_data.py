"""Batches: functions of their address, and a validation that leaves nothing out."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytensor as tt
from minigpt.data import Dataset
from tinytensor import random

IDS = np.arange(1000, dtype=np.int32)  # every token says where it stands
ADDRESSES = list(itertools.product((0, 7), (0, 1, 2), (0, 1)))  # (seed, step, micro-step)


def test_a_batch_is_a_function_of_its_address() -> None:
    first = {address: Dataset(IDS, 8).batch(*address, rows=4)[0] for address in ADDRESSES}
    data = Dataset(IDS, 8)
    tt.manual_seed(5)
    with random.scope(11, 12, 13):  # neither the order nor any other random state has a say
        again = {address: data.batch(*address, rows=4)[0] for address in reversed(ADDRESSES)}
    assert all(np.array_equal(first[a], again[a]) for a in ADDRESSES)
    assert len({x.tobytes() for x in first.values()}) == len(ADDRESSES)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_row_does_not_depend_on_the_number_of_rows(address: tuple[int, int, int]) -> None:
    data = Dataset(IDS, 8)
    x, y = data.batch(*address, rows=9)
    for rows in (1, 2, 5, 8):
        fewer_x, fewer_y = data.batch(*address, rows=rows)
        assert np.array_equal(fewer_x, x[:rows])
        assert np.array_equal(fewer_y, y[:rows])


def test_targets_are_the_next_tokens_of_a_window_of_the_training_split() -> None:
    x, y = Dataset(IDS, 8).batch(1, 2, 3, rows=50)
    assert x.shape == y.shape == (50, 8)
    assert x.dtype == np.int32
    assert np.array_equal(y, x + 1)
    assert np.array_equal(x, x[:, :1] + np.arange(8))
    assert y.max() < 900


def test_windows_start_anywhere_and_evenly() -> None:
    data = Dataset(IDS[:40], 8)  # 36 to train on: windows start at 0 to 27
    starts = np.concatenate([data.batch(0, step, 0, rows=100)[0][:, 0] for step in range(28)])
    counts = np.bincount(starts, minlength=28)
    assert len(counts) == 28
    assert 60 < counts.min() <= counts.max() < 140  # 100 each, ± 4 deviations


@given(tokens=st.integers(20, 300), block=st.integers(1, 17), rows=st.integers(1, 9))
def test_validation_covers_every_target_once(tokens: int, block: int, rows: int) -> None:
    data = Dataset(IDS[:tokens], block)
    cut = int(tokens * 0.9)
    seen = []
    for x, y in data.validation(rows):
        assert x.shape == y.shape
        assert 1 <= x.shape[0] <= rows
        assert 1 <= x.shape[1] <= block
        assert np.array_equal(y, x + 1)
        seen += y.ravel().tolist()
    assert seen == list(range(cut + 1, tokens))


def test_the_first_nine_tenths_are_for_training() -> None:
    data = Dataset(IDS, 8)
    assert (data.train.tolist(), data.val.tolist()) == (list(range(900)), list(range(900, 1000)))
    assert len(Dataset(IDS, 8, val_share=0.5).train) == 500


@pytest.mark.parametrize(
    ("tokens", "block", "train", "val"), [(0, 1, 0, 0), (1, 1, 0, 1), (10, 4, 9, 1), (11, 9, 9, 2), (300, 270, 270, 30)]
)
def test_short_texts_are_refused_with_the_numbers(tokens: int, block: int, train: int, val: int) -> None:
    with pytest.raises(ValueError) as caught:
        Dataset(IDS[:tokens], block)
    message = str(caught.value)
    assert f"the text has {tokens} tokens: {train} to train on and {val} to validate on" in message
    assert f"block_size={block} needs more than {block} and at least 2" in message
    assert message.endswith("use a longer text or a smaller block")


def test_the_shortest_text_there_is() -> None:
    data = Dataset(IDS[:11], 8)
    assert data.batch(0, 0, 0, rows=3)[0].tolist() == [list(range(8))] * 3
    assert [(x.tolist(), y.tolist()) for x, y in data.validation(4)] == [([[9]], [[10]])]

from __future__ import annotations

import numpy as np
import pytest
import torch
from aeon.datasets import load_classification

from tstlens.data import load_dataset
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    DownloadError,
    SeriesValueError,
    UnknownDatasetError,
)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A cache of aeon's with nothing in it, and a way to put data sets there."""
    monkeypatch.setenv("AEON_DATA", str(tmp_path))

    def put(name: str, train: str, test: str, equal: bool = False, classes: str = "1 2") -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        for part, rows in (("TRAIN", train), ("TEST", test)):
            header = (
                f"@problemName {name}\n@timeStamps false\n@missing false\n@univariate true\n"
                f"@equalLength {str(equal).lower()}\n@classLabel true {classes}\n@data\n"
            )
            (tmp_path / name / f"{name}_{part}.ts").write_text(header + rows)

    return put


def test_japanese_vowels_is_what_aeon_reads_with_classes_from_zero():
    raw, labels = load_classification("JapaneseVowels", split="test", load_equal_length=True)
    data = load_dataset("JapaneseVowels")
    assert data.series.shape == (370, 12, 25) and data.series.dtype == torch.float32
    np.testing.assert_array_equal(data.series.numpy(), raw.astype("float32"))
    np.testing.assert_array_equal(data.labels.numpy(), labels.astype(int) - 1)
    assert data.class_names == tuple("123456789")
    assert data.mask is None and data.scaling is None
    assert (data.name, data.split) == ("JapaneseVowels", "test")


def test_unequal_lengths_are_padded_alike_in_both_splits():
    raw, _ = load_classification("JapaneseVowels", split="train", load_equal_length=False)
    train = load_dataset("JapaneseVowels", "train", equal_length=False)
    test = load_dataset("JapaneseVowels", "test", equal_length=False)
    assert max(array.shape[1] for array in raw) == 26
    assert train.n_time == test.n_time == 29
    assert train.lengths.tolist() == [array.shape[1] for array in raw]
    for array, row in zip(raw, train.unpadded(), strict=True):
        np.testing.assert_array_equal(array.astype("float32"), row.numpy())


def test_numeric_class_names_are_not_sorted_as_words():
    raw, labels = load_classification("PickupGestureWiimoteZ", split="test", load_equal_length=True)
    data = load_dataset("PickupGestureWiimoteZ")
    assert data.class_names == tuple(str(number) for number in range(1, 11))
    np.testing.assert_array_equal(data.labels.numpy(), labels.astype(int) - 1)
    np.testing.assert_array_equal(data.series.numpy(), raw.astype("float32"))


def test_both_splits_at_once_are_train_and_then_test():
    train, test, both = (load_dataset("BasicMotions", split) for split in ("train", "test", "all"))
    assert both.series.equal(torch.cat([train.series, test.series]))
    assert both.labels.equal(torch.cat([train.labels, test.labels]))
    assert both.class_names == ("badminton", "running", "standing", "walking")


def test_per_channel_scaling_of_the_test_split_uses_the_training_split():
    train, test = load_dataset("BasicMotions", "train"), load_dataset("BasicMotions")
    scaled = load_dataset("BasicMotions", scaling="per_channel")
    mean = train.series.double().mean((0, 2), keepdim=True)
    std = train.series.double().std((0, 2), keepdim=True, unbiased=False)
    torch.testing.assert_close(scaled.series, ((test.series - mean) / std).float())
    assert scaled.scaling is not None and scaled.scaling.kind == "per_channel"
    each = load_dataset("BasicMotions", scaling="per_series").series
    torch.testing.assert_close(each.mean(2), torch.zeros(40, 6), atol=1e-5, rtol=0)


def test_an_unknown_name_is_answered_with_the_nearest(archive):
    with pytest.raises(UnknownDatasetError) as caught:
        load_dataset("JapaneseVowel")
    assert "unknown data set 'JapaneseVowel'; did you mean 'JapaneseVowels'? known: " in str(
        caught.value
    )
    with pytest.raises(UnknownDatasetError, match="aeon spells it 'GunPoint'"):
        load_dataset("GUNPOINT")


def test_a_failed_download_says_what_there_is_offline(archive, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("aeon.datasets._data_loaders.urlopen", unreachable)
    monkeypatch.setattr("aeon.datasets._data_loaders._download_all_zenodo_files", unreachable)
    with pytest.raises(DownloadError) as caught:
        load_dataset("Coffee")
    message = str(caught.value)
    assert message.startswith("Coffee is not on this disk and could not be downloaded")
    assert f"put Coffee_TRAIN.ts and Coffee_TEST.ts into {tmp_path / 'Coffee'}" in message
    assert "offline there are" in message and "JapaneseVowels" in message
    assert "Covid3Month," not in message


def test_unequal_series_without_an_equal_version_are_never_cut_or_padded_unasked(archive):
    archive("Ragged", "1.0,2.0:1\n1.0,2.0,3.0:2\n", "5.0:2\n")
    with pytest.raises(ArgumentError) as caught:
        load_dataset("Ragged", "train")
    assert str(caught.value) == (
        "expected series of equal length, got 2 to 3 samples: Ragged has no equal-length version; "
        "use equal_length=False to get them padded, with a mask"
    )
    test = load_dataset("Ragged", equal_length=False)
    assert test.series.tolist() == [[[5.0, 0.0, 0.0]]]
    assert test.labels.tolist() == [1] and test.class_names == ("1", "2")


def test_missing_values_point_to_the_imputed_version(archive):
    archive("Gaps", "1.0,?:1\n2.0,3.0:2\n", "1.0,2.0:1\n", equal=True)
    with pytest.raises(SeriesValueError, match=r"Gaps has missing values: .* at \[0, 0, 1\].*_nmv"):
        load_dataset("Gaps", "train")


def test_labels_written_as_decimals_match_the_header(archive):
    archive("Decimals", "1.0,2.0:2.0\n", "2.0,3.0:1.0\n", equal=True)
    data = load_dataset("Decimals", "all")
    assert (data.labels.tolist(), data.class_names) == ([1, 0], ("1", "2"))


def test_a_damaged_file_is_called_that(archive):
    archive("Broken", "1.0,nonsense:1\n", "1.0,2.0:1\n", equal=True)
    with pytest.raises(CorruptFileError, match="the train file of Broken could not be read"):
        load_dataset("Broken", "train")


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ArgumentError, match="expected split in .*'train', 'test', 'all'.*'val'"):
        load_dataset("GunPoint", "val")
    with pytest.raises(ArgumentError, match="expected scaling in .* or None, got 'minmax'"):
        load_dataset("GunPoint", scaling="minmax")
    with pytest.raises(ArgumentError, match="Covid3Month, which has a regression target"):
        load_dataset("Covid3Month")

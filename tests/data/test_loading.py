from __future__ import annotations

import numpy as np
import pytest
import torch
from aeon.datasets import load_classification
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data import load_dataset
from tstlens.data.ts_file import read_ts
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


def test_classes_are_those_of_both_files(archive):
    for train, test in (("a c", "a b c"), ("a b c", "a c")):
        archive("Split", "1,2:a\n1,2:c\n", "1,2:a\n1,2:c\n", equal=True, classes=train)
        archive("Split", "1,2:a\n1,2:c\n", "1,2:c\n1,2:a\n", equal=True, classes=test)
        both = [load_dataset("Split", split) for split in ("train", "test")]
        assert both[0].class_names == both[1].class_names
        named = [[data.class_names[i] for i in data.labels] for data in both]
        assert named == [["a", "c"], ["c", "a"]]
    archive("Rows", "1,2:a\n1,2:c\n", "1,2:a\n1,2:b\n1,2:c\n", equal=True, classes="a")
    train, test = load_dataset("Rows", "train"), load_dataset("Rows")
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert train.labels.tolist() == [0, 2] and test.labels.tolist() == [0, 1, 2]


def test_names_that_come_apart_in_the_header_are_no_classes(archive):
    archive("Spaces", "1,2:left hand\n1,2:a,b\n", "1,2:a,b\n", True, "left hand a,b")
    data = load_dataset("Spaces", "train")
    assert (data.labels.tolist(), data.class_names) == ([1, 0], ("a,b", "left hand"))


def test_channels_with_other_time_stamps_are_refused(tmp_path):
    path = tmp_path / "Late.ts"
    for second in ("(5,5),(6,6)", "(0,5),(2,6)"):
        path.write_text(f"@timestamps true\n@classLabel true a\n@data\n(0,1),(1,2):{second}:a\n")
        with pytest.raises(ArgumentError, match="channels of one series have other time stamps"):
            read_ts(path)


@pytest.mark.parametrize("label", ["malignant", "nan-o", "b'10'", "what?"])
def test_labels_are_kept_as_written(archive, label):
    archive("Names", f"1,2: {label}\n3,4:other\n", f"1,2:{label} \n", True, f"{label} other")
    data = load_dataset("Names", "train")
    assert set(data.class_names) == {label, "other"}
    assert [data.class_names[i] for i in data.labels] == [label, "other"]


def ts(tmp_path, rows, header="@classLabel true a\n", newline="\n", start=""):
    path = tmp_path / "one.ts"
    text = f"{start}# a comment\n\n@timeStamps {{}}\n{header}@data\n"
    path.write_bytes((text.format("true" if "(" in rows else "false") + rows).replace(
        "\n", newline).encode())  # fmt: skip
    return path


@given(
    st.lists(st.floats(-1e30, 1e30, allow_nan=False, width=64), min_size=1, max_size=5),
    st.sampled_from(["plain", "numbers", "dates"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_what_is_written_is_read(tmp_path_factory, values, stamps, newline, start):
    if stamps == "plain":
        row = ",".join(map(repr, values))
    else:
        when = [f"{i}.5" if stamps == "numbers" else f"2020-01-0{i + 1} 10:00:00" for i in range(5)]
        row = ",".join(f"({t},{x!r})" for t, x in zip(when, values, strict=False))
    path = ts(tmp_path_factory.mktemp("ts"), f"{row}:{row}:a\n\n", newline=newline, start=start)
    found = read_ts(path)
    np.testing.assert_array_equal(found.arrays, [[values, values]])
    assert found.labels == ["a"] and set(found.class_names) == {"a"}


@pytest.mark.parametrize(
    ("rows", "header", "error", "message"),
    [
        ("", "@classLabel true a\n", CorruptFileError, "expected series after @data"),
        ("1,2:3:a\n", "@classLabel true a\n", CorruptFileError, "channels of one length"),
        ("1,2:3,4:a\n", "@univariate true\n", CorruptFileError, "header says univariate"),
        ("1,2:a\n1:a\n", "@equalLength true\n", CorruptFileError, "says equal lengths"),
        ("1,2:a\n1,2:1,2:a\n", "", CorruptFileError, "2 channels after 1"),
        ("1_0,2:a\n", "", CorruptFileError, "expected a number, got '1_0'"),
        ("(0,1),(1,2),(3,4):a\n", "", ArgumentError, "not evenly spaced"),
        ("(0,1),2:a\n", "", CorruptFileError, "pairs and a label"),
        ("1,2:0.5\n", "@targetLabel true\n", ArgumentError, "regression target"),
    ],
)
def test_what_is_not_what_its_header_says_is_refused(tmp_path, rows, header, error, message):
    with pytest.raises(error, match=message):
        read_ts(ts(tmp_path, rows, header))


def test_no_labels_infinity_and_forecasting_sets_are_called_what_they_are(archive, tmp_path):
    assert read_ts(ts(tmp_path, "1,2\n", "@classLabel false\n")).labels is None
    archive("Endless", "1.0,inf:1\n", "1.0,2.0:1\n", equal=True)
    with pytest.raises(SeriesValueError, match="^Endless: .*got infinity"):
        load_dataset("Endless", "train")
    for name in ("Airline", "solar"):
        with pytest.raises(ArgumentError, match="one long series for forecasting"):
            load_dataset(name)

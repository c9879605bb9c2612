"""A model saved is the same model loaded; what is broken on disk is refused with the reason."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tstlens import storage
from tstlens.errors import (
    ArgumentError,
    ConfigVersionError,
    CorruptFileError,
    DownloadError,
    StorageError,
    UnknownCheckpointError,
)
from tstlens.model import (
    CustomConfig,
    HookedTST,
    HookedTSTConfig,
    Parity,
    describe_checkpoint,
    list_checkpoints,
    seal_checkpoint,
)
from tstlens.model.folders import checkpoints_folder

PARITY = Parity(1e-7, 2e-7, 1e-5, 1e-15, 2e-15, 1e-10, ("random [8, 3, 12]",), "a.Source")


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model("patches", positions="learned")
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def only_entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_model_gives_bit_identical_logits(
    make_model, own_modules, series, tmp_path, front_end, norm_position, dtype
):
    model = make_model(front_end, norm_position=norm_position, final_norm=True).to(dtype)
    model.parity, model.info = PARITY, {"data": "none", "accuracy": 0.5}
    model.cfg.class_names = ("a", "b", "c", "d")
    assert model.save_pretrained(tmp_path / "deep" / "model") == tmp_path / "deep" / "model"
    modules = {"embed": own_modules[0]()} if front_end == "custom" else {}
    again = HookedTST.from_pretrained(tmp_path / "deep" / "model", **modules)
    assert torch.equal(again(series.to(dtype)), model(series.to(dtype)))
    assert again.cfg == model.cfg and again.cfg.dtype == dtype
    assert again.parity == PARITY and again.info == model.info
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert only_entries(tmp_path / "deep") == ["model"]
    assert only_entries(tmp_path / "deep" / "model") == ["config.json", "model.safetensors"]


def test_the_weights_are_readable_without_tstlens(saved):
    from safetensors.torch import load_file

    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights["blocks.1.attn.W_O"], model.W_O[1])
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["n_heads"] == 2 and record["format_version"] == 1
    assert describe_checkpoint(folder) == record


def test_device_and_dtype_are_what_was_asked_for(saved, series):
    model, folder = saved
    cast = HookedTST.from_pretrained(folder, device="cpu", dtype=torch.float64)
    assert cast.cfg.dtype == torch.float64 and str(cast.cfg.device) == "cpu"
    torch.testing.assert_close(cast(series.double()).float(), model(series))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data + b"\0",
    ],
    ids=["one byte short", "half", "empty", "a flipped bit", "a flipped header", "longer"],
)
def test_truncated_or_altered_weights_are_refused(saved, damage):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFileError, match=r"truncated or was altered: its SHA-256 is"):
        HookedTST.from_pretrained(folder)


def rewrite(folder, change, sealed=False):
    """Change what config.json says; in a folder from before its own sum was kept, or in one now."""
    record = json.loads((folder / "config.json").read_text())
    change(record)
    if not sealed:
        record.pop("config_sha256")
    (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda r: r.update(format_version=2), ConfigVersionError, "version 2, .* up to 1; update"),
        (lambda r: r.pop("format_version"), ConfigVersionError, "format version None"),
        (lambda r: r.update(format="other"), CorruptFileError, "not the config of a tstlens model"),
        (lambda r: r.pop("config"), CorruptFileError, "does not describe a model"),
        (lambda r: r["config"].update(n_layers="two"), CorruptFileError, "n_layers as an integer"),
        (lambda r: r["config"].update(extra=1), CorruptFileError, "unknown entries.*extra"),
        (lambda r: r["config"]["embed"].update(kind="?"), CorruptFileError, "unknown name '\\?'"),
        (
            lambda r: r["config"].update(d_mlp=11),
            CorruptFileError,
            r"blocks.0.mlp.W_in is \[8, 10\], not \[8, 11\]",
        ),
        (
            lambda r: r["config"].update(n_layers=3),
            CorruptFileError,
            r"missing blocks.2.attn.W_K",
        ),
        (lambda r: r["config"].update(n_layers=1), CorruptFileError, r"unexpected blocks.1"),
        (lambda r: r.update(parity={"max_abs": 1}), CorruptFileError, "does not describe a model"),
        (lambda r: r.pop("weights_sha256"), CorruptFileError, "config.json records None"),
    ],
)
def test_an_altered_config_is_refused(saved, change, error, words, no_shape_checks):
    _, folder = saved
    rewrite(folder, change)
    with pytest.raises(error, match=words):
        HookedTST.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_a_config_that_is_no_json_is_refused(saved, text):
    _, folder = saved
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptFileError, match=r"config.json is no"):
        HookedTST.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["config"].update(act_fn="gelu"),
        lambda r: r["config"].update(eps=1e-6),
        lambda r: r["config"].update(causal=True),
        lambda r: r["info"].update(scaling="standard"),
        lambda r: r.update(files={}) if r["files"] else r.update(files={"saes/x/cfg.json": ""}),
    ],
)
def test_a_config_that_would_give_other_results_is_refused_until_it_is_sealed(
    saved, series, change
):
    model, folder = saved
    rewrite(folder, change, sealed=True)
    words = r"config.json was altered: the SHA-256 of what it says is \w{12}….*seal_checkpoint\('"
    for read in (HookedTST.from_pretrained, describe_checkpoint):
        with pytest.raises(CorruptFileError, match=words):
            read(folder)
    assert seal_checkpoint(folder) == folder
    again = HookedTST.from_pretrained(folder)
    assert again(series).shape == model(series).shape


def test_the_layout_of_a_config_is_free_and_old_folders_load(saved, series):
    model, folder = saved
    record = json.loads((folder / "config.json").read_text())
    assert list(record)[:4] == ["format", "format_version", "weights_sha256", "files"]
    (folder / "config.json").write_text(json.dumps(dict(reversed(record.items())), indent=7))
    assert torch.equal(HookedTST.from_pretrained(folder)(series), model(series))
    old = {k: v for k, v in record.items() if k not in ("files", "config_sha256")}
    (folder / "config.json").write_text(json.dumps(old))
    assert torch.equal(HookedTST.from_pretrained(folder)(series), model(series))
    seal_checkpoint(folder)
    assert json.loads((folder / "config.json").read_text()) == record


def test_what_is_no_model_cannot_be_sealed(saved, tmp_path):
    with pytest.raises(StorageError, match="expected config.json"):
        seal_checkpoint(tmp_path)
    _, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"expected model.safetensors in .*, found none"):
        seal_checkpoint(folder)


@pytest.mark.parametrize("name", list_checkpoints())
def test_shipped_checkpoints_record_everything_that_they_load(name):
    import hashlib

    folder = checkpoints_folder() / name
    for model in (folder, folder / "codebooks"):
        if not model.is_dir():
            continue
        record = describe_checkpoint(model)
        assert "config_sha256" in record
        parts = {*model.glob("saes/*/cfg.json"), *model.glob("saes/*/sae_weights.safetensors")}
        assert {model / part for part in record["files"]} == parts
        for part, digest in record["files"].items():
            assert hashlib.sha256((model / part).read_bytes()).hexdigest() == digest


def test_weights_that_are_no_safetensors_are_refused_even_with_the_right_digest(saved):
    import hashlib

    _, folder = saved
    (folder / "model.safetensors").write_bytes(b"not tensors at all")
    digest = hashlib.sha256(b"not tensors at all").hexdigest()
    rewrite(folder, lambda record: record.update(weights_sha256=digest))
    with pytest.raises(CorruptFileError, match="is no safetensors file"):
        HookedTST.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(StorageError, match=f"expected {name} in .*, found none"):
        HookedTST.from_pretrained(folder)


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but pytest does not stop at it."""


def fail_in(name):
    """A step of the save fails."""

    def arrange(monkeypatch, error):
        def failing(*args, **kwargs):
            raise error

        monkeypatch.setattr(storage, name, failing)

    return arrange


def fail_at_swap(before):
    """The swap of two names in one step fails, before it does its work or just after."""

    def arrange(monkeypatch, error):
        exchange = storage._exchange

        def exchanged(*args):
            if before:
                raise error
            assert exchange(*args)
            raise error

        monkeypatch.setattr(storage, "_exchange", exchanged)

    return arrange


def fail_at_rename(number, before):
    """Names cannot be swapped, and a rename fails, before it does its work or just after."""

    def arrange(monkeypatch, error):
        calls, rename = [], os.rename

        def renamed(*args):
            calls.append(args)
            if len(calls) == number and before:
                raise error
            rename(*args)
            if len(calls) == number:
                raise error

        monkeypatch.setattr(storage, "_exchange", lambda *args: False)
        monkeypatch.setattr(storage.os, "rename", renamed)

    return arrange


@pytest.mark.parametrize("error", [OSError("no space left"), Interrupted()], ids=["disk", "ctrl-c"])
@pytest.mark.parametrize(
    ("arrange", "new_survives"),
    [
        (fail_in("write_tensors"), False),
        (fail_in("digest"), False),
        (fail_at_swap(before=True), False),
        (fail_at_swap(before=False), True),
        (fail_at_rename(1, before=True), False),
        (fail_at_rename(1, before=False), False),
        (fail_at_rename(2, before=True), False),
        (fail_at_rename(2, before=False), True),
    ],
)
def test_an_interrupted_save_leaves_a_whole_model(
    saved, make_model, series, monkeypatch, arrange, new_survives, error
):
    model, folder = saved
    (folder / "README.md").write_text("mine")
    other = make_model("patches", positions="learned", seed=1)
    with monkeypatch.context() as patch:
        arrange(patch, error)
        with pytest.raises((StorageError, Interrupted)) as caught:
            other.save_pretrained(folder)
    if isinstance(error, OSError):
        assert "could not write the model to" in str(caught.value)
    survivor = other if new_survives else model
    assert torch.equal(HookedTST.from_pretrained(folder)(series), survivor(series))
    assert (folder / "README.md").read_text() == "mine"
    assert only_entries(folder.parent) == ["model"]
    other.save_pretrained(folder)
    assert torch.equal(HookedTST.from_pretrained(folder)(series), other(series))


def test_an_interrupted_first_save_leaves_nothing(make_model, tmp_path, monkeypatch):
    fail_in("write_tensors")(monkeypatch, OSError("no space left"))
    with pytest.raises(StorageError, match="no space left; what was there is as it was"):
        make_model().save_pretrained(tmp_path / "new")
    assert only_entries(tmp_path) == []


def test_saving_again_replaces_the_model_and_keeps_other_files(saved, make_model, series):
    _, folder = saved
    (folder / "README.md").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "one.png").write_bytes(b"png")
    other = make_model("conv", norm_position="post")
    other.save_pretrained(folder)
    assert torch.equal(HookedTST.from_pretrained(folder)(series), other(series))
    assert only_entries(folder) == ["README.md", "config.json", "figures", "model.safetensors"]
    assert (folder / "figures" / "one.png").read_bytes() == b"png"
    assert only_entries(folder.parent) == ["model"]


def test_saving_through_a_link_keeps_the_link(saved, make_model, series):
    _, folder = saved
    link = folder.parent / "link"
    link.symlink_to(folder)
    other = make_model()
    other.save_pretrained(link)
    assert link.is_symlink()
    assert torch.equal(HookedTST.from_pretrained(folder)(series), other(series))


def test_places_that_cannot_hold_a_model_are_refused(make_model, tmp_path, monkeypatch):
    model = make_model()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="expected a folder at .*, found a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(StorageError, match="could not write the model to"):
        model.save_pretrained(tmp_path / "file" / "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in (".", "..", str(tmp_path)):
        with pytest.raises(StorageError, match="the working directory.*a folder of its own"):
            model.save_pretrained(place)
    assert only_entries(tmp_path) == ["file", "work"]
    model.save_pretrained("relative")
    assert only_entries(tmp_path / "work" / "relative") == ["config.json", "model.safetensors"]


def test_info_that_is_no_json_is_refused_and_the_old_model_stays(saved, series):
    model, folder = saved
    before = model(series)
    model.info = {"tensor": torch.zeros(2)}
    with pytest.raises(ArgumentError, match="info goes into config.json and must hold JSON"):
        model.save_pretrained(folder)
    assert torch.equal(HookedTST.from_pretrained(folder)(series), before)


def custom(own_modules):
    embed, head = own_modules
    cfg = HookedTSTConfig(1, 8, 2, 4, CustomConfig("my.lab.Embed"), CustomConfig("my.lab.Head"))
    return HookedTST(cfg, embed=embed(), head=head())


def test_modules_of_the_user_are_asked_for_again(own_modules, series, tmp_path, no_shape_checks):
    embed, head = own_modules
    model = custom(own_modules)
    model.save_pretrained(tmp_path / "m")
    again = HookedTST.from_pretrained(tmp_path / "m", embed=embed(), head=head())
    assert torch.equal(again(series), model(series))
    for given, missing, name in [
        ({"head": head()}, "embed", "Embed"),
        ({"embed": embed()}, "head", "Head"),
    ]:
        with pytest.raises(
            ArgumentError,
            match=rf"{missing} is a module of your own \(my.lab.{name}\), whose code is not saved "
            rf"with the weights; pass it again: HookedTST.from_pretrained\(..., "
            rf"{missing}=<your {name}>\)",
        ):
            HookedTST.from_pretrained(tmp_path / "m", **given)
    with pytest.raises(ArgumentError, match="got the class Embed"):
        HookedTST.from_pretrained(tmp_path / "m", embed=embed, head=head())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            lambda embed: torch.nn.Linear(3, 8),
            "missing embed.module.bias.*unexpected embed.module.f",
        ),
        (lambda embed: embed(d_model=9), r"embed.module.second.bias is \[8\], not \[9\]"),
        (lambda embed: torch.nn.Identity(), "unexpected embed.module.first.bias"),
    ],
)
def test_another_module_than_was_saved_is_refused(own_modules, tmp_path, module, words):
    embed, head = own_modules
    custom(own_modules).save_pretrained(tmp_path / "m")
    with pytest.raises(CorruptFileError, match=words) as caught:
        HookedTST.from_pretrained(tmp_path / "m", embed=module(embed), head=head())
    assert "pass the same class with the same sizes" in str(caught.value)


def test_tied_weights_of_a_users_module_save_and_load(own_modules, series, tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(3, 8)
            self.two = self.one

        def forward(self, series):
            x = series.transpose(1, 2)
            return self.one(x) + self.two(x)

    cfg = HookedTSTConfig(1, 8, 2, 4, CustomConfig("Tied"), CustomConfig("Head"))
    model = HookedTST(cfg, embed=Tied(), head=own_modules[1]())
    model.save_pretrained(tmp_path / "m")
    again = HookedTST.from_pretrained(tmp_path / "m", embed=Tied(), head=own_modules[1]())
    assert torch.equal(again(series), model(series))


def test_an_unknown_checkpoint_lists_what_ships(tmp_path, monkeypatch):
    (tmp_path / "gunpoint").mkdir()
    (tmp_path / "gunpoint" / "config.json").write_text("{}")
    (tmp_path / "not-a-model").mkdir()
    monkeypatch.setattr("tstlens.model.folders.checkpoints_folder", lambda: tmp_path)
    assert list_checkpoints() == ["gunpoint"]
    with pytest.raises(UnknownCheckpointError, match="did you mean 'gunpoint'.*save_pretrained"):
        HookedTST.from_pretrained("gun-point")
    with pytest.raises(UnknownCheckpointError, match="unknown checkpoint '/no/such/folder'"):
        HookedTST.from_pretrained("/no/such/folder")


@pytest.mark.parametrize("name", ["nobody/nothing", "no body/??"])
def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch, name):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="neither a folder here nor a checkpoint.*the network"):
        HookedTST.from_pretrained(name)


def test_a_hub_id_is_downloaded_and_loaded(saved, series, monkeypatch):
    import huggingface_hub

    model, folder = saved
    asked = []

    def snapshot_download(hub_id, **kwargs):
        asked.append(hub_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    again = HookedTST.from_pretrained("somebody/model")
    assert asked == ["somebody/model"] and torch.equal(again(series), model(series))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="dies in a fork of this process")
def test_a_killed_save_leaves_the_old_model(saved, series, monkeypatch):
    """A process that dies in the middle of writing weights, not one that unwinds."""
    model, folder = saved
    monkeypatch.setattr(storage, "write_tensors", lambda *args, **kwargs: os._exit(9))
    child = os.fork()
    if child == 0:
        try:
            model.save_pretrained(folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert torch.equal(HookedTST.from_pretrained(folder)(series), model(series))


def test_weights_can_be_read_by_whoever_can_read_the_config(make_model, tmp_path):
    folder = make_model().save_pretrained(tmp_path / "model")
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]

"""The page of codes: what it holds, and how it behaves in Chromium."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

from tests.figures.devtools import Browser, find_chromium
from tstlens.codebooks import CodeIndex, CodeNotes, browse
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, StorageError

MLP_OUT, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
NASTY = "</script><script>document.title='owned'</script>&\"'<img src=x onerror=alert(1)>\u2028é"


@pytest.fixture(scope="module")
def made(make_model, make_book):
    model = make_model()
    model.add_codebook(make_book(k=2), MLP_OUT)
    model.add_codebook(make_book(n_groups=2), Z)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    series = torch.randn(24, 3, 10, generator=generator) + labels[:, None, None]
    mask = torch.arange(10) < torch.randint(5, 11, (24,), generator=generator)[:, None]
    data = TimeSeriesData(series, labels, (NASTY, "b", "c"), mask=mask, name="toy", split="train")
    return model, data


@pytest.fixture(scope="module")
def index(made) -> CodeIndex:
    model, data = made
    return CodeIndex.build(model, data, progress=False)


def data_of(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def unpacked(entry):
    kinds = {"f4": "<f4", "u4": "<u4", "i2": "<i2", "u2": "<u2", "u1": "u1"}
    return np.frombuffer(base64.b64decode(entry["b"]), kinds[entry["t"]])


def units_of(index):
    return [(hook, u) for hook, book in index.books.items() for u in range(book.n_units)]


def test_the_page_holds_the_numbers_of_the_index(index, tmp_path):
    data = data_of(index.to_html(tmp_path / "page.html", n_windows=4))
    frame = index.to_dataframe()
    units = units_of(index)
    labels = index.data.labels.numpy()
    p, w = data["prototypes"], data["windows"]
    mean = unpacked(p["mean"]).reshape(len(units), p["count"], p["width"])
    spread = unpacked(p["spread"]).reshape(mean.shape)
    starts, slots = unpacked(w["start"]), unpacked(w["slot"])
    for at, (hook, unit) in enumerate(units):
        group, _, code = index.books[hook].named(unit)
        assert data["codes"]["names"][at][0::2] == [group, code]
        part = frame[(frame.hook == hook) & (frame.group == group) & (frame.code == code)]
        assert unpacked(data["table"]["support"])[at] == len(part)
        assert unpacked(data["table"]["series"])[at] == part.series.nunique()
        share = unpacked(data["table"]["density"])[at]
        assert share == pytest.approx(len(part) / int(index.data.mask.sum()))
        counts = np.bincount(labels[part.series], minlength=3)
        assert (
            unpacked(data["classTable"]["places"])[3 * at : 3 * at + 3].tolist() == counts.tolist()
        )
        if not len(part):
            continue
        windows = index.windows(hook, code, group=group)
        np.testing.assert_allclose(mean[at], windows.prototype()[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(spread[at], windows.prototype()[1], rtol=1e-4, atol=1e-5)
        best = index.windows(hook, code, group=group, per_series=1, n=4)
        own = slots[starts[at] : starts[at + 1]]
        assert own.tolist() == (best.series * 10 + best.pos).tolist()
    names = [one["name"] for one in data["searches"]]
    assert names == [f"class {NASTY}", "class b", "class c"]
    search = index.search(label="b")
    rows = data["searches"][1]["rows"]
    assert [row["test"][0] for row in rows] == [round(c.test.precision, 5) for c in search.codes]
    assert [row["neuron"]["test"][0] for row in rows] == [
        round(c.neuron.test.precision, 5) for c in search.codes
    ]
    found = [data["codes"]["names"][row["unit"]][2] for row in rows]
    assert found == [one.code for one in search.codes]
    similar = index.similar(MLP_OUT, 3, n=8)
    overlap = unpacked(data["similar"]["overlap"]).reshape(len(units), -1)[3]
    np.testing.assert_allclose(overlap, similar.overlap, rtol=1e-5)


def test_browse_takes_notes_from_a_file_and_text_cannot_break_out(made, tmp_path):
    model, data = made
    notes = CodeNotes().add(NASTY, MLP_OUT, 3).save(tmp_path / "notes.json")
    path = browse(
        model, data, tmp_path / "page.html", notes=notes, title=NASTY, progress=False, test=data[:9]
    )
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert data_of(path)["notes"] == {f"{MLP_OUT}|0||3": NASTY}
    assert "toy train" in data_of(path)["searches"][0]["on"]
    with pytest.raises(StorageError, match="found no file"):
        browse(model, data, tmp_path / "page.html", notes="nowhere.json", progress=False)
    assert path.read_text(encoding="utf-8") == text


def test_errors_of_pages(index, tmp_path, no_shape_checks):
    with pytest.raises(StorageError, match="found a folder; name a file in it"):
        index.to_html(tmp_path)
    with pytest.raises(ArgumentError, match="n_windows as an integer of at least 1, got 0"):
        index.to_html(tmp_path / "x.html", n_windows=0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chrome or Chromium on the path, and BROWSER_PATH is not set")
    one = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def written(index, tmp_path_factory):
    notes = CodeNotes().add(NASTY, MLP_OUT, 3)
    return index.to_html(tmp_path_factory.mktemp("page") / "page.html", notes=notes)


@pytest.fixture
def page(browser, written):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(written.as_uri())
    browser.run("localStorage.clear()")
    browser.open(written.as_uri() + "?again")
    yield browser
    assert browser.errors == []
    elsewhere = [u for u in browser.requests if not u.startswith(("file:", "blob:"))]
    assert elsewhere == []


def texts(page, selector):
    return page.run(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
    )


@pytest.mark.browser
def test_a_click_opens_a_code_with_its_prototype_windows_and_classes(page, index):
    active = sum(int((book.support > 0).sum()) for book in index.books.values())
    assert len(texts(page, "#latents tbody tr")) == active
    unit = int(page.run("document.querySelector('#latents tbody tr').dataset.row"))
    hook, of_hook = units_of(index)[unit]
    group, head, code = index.books[hook].named(of_hook)
    page.click("#latents tbody tr td:nth-child(3)")
    page.wait("!document.querySelector('#code').hidden")
    heading = texts(page, "#code h2")[0]
    assert heading == f"Code {code}" + (f" of head {head}" if head is not None else "")
    assert page.run("document.querySelectorAll('.proto svg').length") == 3
    assert page.run("document.querySelectorAll('.proto path.band').length") == 3
    windows = index.windows(hook, code, group=group, per_series=1, n=9)
    shown = [f"series {s}, samples {a}–{b - 1}" for s, a, b in zip(
        windows.series, windows.start, windows.stop, strict=True)]  # fmt: skip
    assert texts(page, ".grid figcaption span") == shown
    assert page.run("document.querySelectorAll('.grid figure rect.window').length") == len(shown)
    assert page.run("document.querySelectorAll('.bars').length") == 1
    assert page.run("(c => [c.width, c.height])(document.querySelector('canvas'))") == [10, 24]
    page.click("#next")
    page.wait(f"location.hash !== '#{unit}'")
    page.click("#back")
    page.wait("!document.querySelector('#index').hidden")


@pytest.mark.browser
def test_searches_show_precision_and_recall_and_lead_to_their_codes(page, index):
    page.run(
        "(s => { s.value = 1; s.dispatchEvent(new Event('change')); })"
        "(document.getElementById('searched'))"
    )
    search = index.search(label="b")
    rows = texts(page, "#searches tbody tr")
    assert len(rows) == len(search.codes) > 0
    shown = texts(page, "#searches tbody td:nth-child(2)")
    for text, one in zip(shown, search.codes, strict=True):
        assert float(text.split()[0]) == pytest.approx(100 * one.test.precision, abs=0.51)
    page.click("#searches tbody a")
    page.wait("!document.querySelector('#code').hidden")
    assert texts(page, ".found tbody tr td:nth-child(1)").count("class b") == 1


@pytest.mark.browser
def test_the_table_is_sorted_searched_and_narrowed_to_a_hook_point(page, index):
    page.click("th[data-key='share'] button")
    values = [float(one.split()[0]) for one in texts(page, "#latents tbody td:nth-child(6)")]
    assert values == sorted(values, reverse=True)
    page.type("#search", "7")
    assert {one.split()[0] for one in texts(page, "#latents tbody td:nth-child(1)")} <= {"7"}
    page.type("#search", "onerror")  # the note
    assert [one.split()[0] for one in texts(page, "#latents tbody td:nth-child(1)")][:1]
    page.type("#search", "")
    page.run(
        "(s => { s.value = 1; s.dispatchEvent(new Event('change')); })"
        "(document.getElementById('place'))"
    )
    assert set(texts(page, "#latents tbody td:nth-child(2)")) == {"L1.attn.z"}
    used = int((index.books[Z].support > 0).sum())
    assert texts(page, "#count") == [f"{used} of 48 codes"]


@pytest.mark.browser
def test_notes_are_kept_exported_and_imported(page, written, tmp_path):
    page.run("location.hash = '#5'")
    page.wait("!document.querySelector('#code').hidden")
    page.type("#note", "falls at the end")
    page.open(written.as_uri() + "?later")
    page.run("location.hash = '#5'")
    page.wait("document.querySelector('#note') !== null")
    assert page.run("document.getElementById('note').value") == "falls at the end"
    (tmp_path / "notes.json").write_text(page.run("notesAsText()"), encoding="utf-8")
    exported = CodeNotes.load(tmp_path / "notes.json")
    assert exported.get(MLP_OUT, 5) == "falls at the end" and exported.get(MLP_OUT, 3) == NASTY
    others = CodeNotes().add("of a colleague", MLP_OUT, 5).add("new", Z, 2, group=1, head=1)
    text = others.save(tmp_path / "others.json").read_text(encoding="utf-8")
    page.run(f"importNotes({json.dumps(text)})")
    assert texts(page, "#notes-said") == ["2 notes imported."]
    (tmp_path / "notes.json").write_text(page.run("notesAsText()"), encoding="utf-8")
    assert CodeNotes.load(tmp_path / "notes.json").texts == exported.merge(others).texts
    page.run("importNotes('{}')")
    assert "does not hold notes" in texts(page, "#notes-said")[0]


@pytest.mark.browser
def test_text_from_the_data_stays_text_and_phones_do_not_scroll_sideways(page):
    page.send("Emulation.setDeviceMetricsOverride", width=390, height=800,
              deviceScaleFactor=1, mobile=False)  # fmt: skip
    for unit in ("", "3", "5", "20"):
        page.run(f"location.hash = '{unit}'")
        page.wait(f"document.querySelector('#code').hidden === {'false' if unit else 'true'}")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.send("Emulation.clearDeviceMetricsOverride")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.title") != "owned"


@pytest.mark.browser
def test_codes_are_filtered_by_head_and_reached_with_the_keyboard(page, index):
    page.run("document.activeElement.blur()")
    page.press("/")
    page.type("#search", "head 1")
    units = units_of(index)
    of_head = {u for u, (hook, i) in enumerate(units) if index.books[hook].named(i)[1] == 1}
    used = {u for u in of_head if index.books[units[u][0]].support[units[u][1]]}
    rows = "[...document.querySelectorAll('#latents tbody tr')].map(row => Number(row.dataset.row))"
    found = page.run(rows)
    assert set(found) == used and len(found) > 1
    assert texts(page, "#count") == [f"{len(used)} of {len(units)} codes"]
    page.press("ArrowDown", "ArrowDown", "Enter")
    page.wait("!document.querySelector('#code').hidden")
    assert page.run("location.hash") == f"#{found[1]}"
    page.press("Escape")
    page.wait("document.querySelector('#code').hidden")
    focused = "Number(document.activeElement.closest('tr').dataset.row)"
    assert page.run(rows) == found and page.run(focused) == found[1]

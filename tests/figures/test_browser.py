"""The browser page of a dictionary's latents: what it holds, and how it behaves in Chromium."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csc_matrix, hstack
from scipy.sparse import random as random_sparse

from tests.figures.devtools import Browser, find_chromium
from tests.saes import hand_made as made
from tstlens import figures
from tstlens.errors import ArgumentError, StorageError

pytestmark = pytest.mark.saes

NASTY = "</script><script>document.title='owned'</script>&\"'<img src=x onerror=alert(1)>\u2028é"


def features_of(n_latents=40, padded=True, names=None, channel_independent=False):
    from tstlens.saes.reading import features

    if channel_independent:
        model, data = made.per_channel(), made.labelled(n=9, n_channels=3, n_time=32)
    else:
        model, data = made.per_step(), made.labelled(n=30, padded=padded)
    hook = "blocks.0.hook_mlp_out"
    dictionary = made.random_dictionary(
        8, n_latents, hook, threshold=0.3 if channel_independent else 0.9
    )
    if names:
        data = dataclasses.replace(data, class_names=names)
    return features(model, dictionary, data, n_permutations=100, progress=False)


def data_of(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def unpacked(entry):
    kinds = {"f4": "<f4", "u4": "<u4", "i2": "<i2", "u2": "<u2", "u1": "u1"}
    return np.frombuffer(base64.b64decode(entry["b"]), kinds[entry["t"]])


def test_the_page_holds_the_numbers_of_the_result(tmp_path):
    features = features_of()
    data = data_of(features.to_html(tmp_path / "page.html"))
    table = features.table()
    for name in ("density", "series", "max", "auc", "effect", "cosine"):
        np.testing.assert_allclose(unpacked(data["table"][name]), table[name], rtol=1e-6)
    words = data["table"]["property"]
    for code, name in zip(unpacked(words["codes"]), table["property"], strict=True):
        assert (code == 65535 and name != name) or words["words"][code] == name
    raw = unpacked(data["raw"]["values"]).reshape(30, 2, 16).astype(float)
    low, step = (np.array(data["raw"][key])[:, None] for key in ("low", "step"))
    values = np.where(raw == data["raw"]["padding"], np.nan, low + (raw + 32500) * step)
    mask = features.data.mask.numpy()[:, None].repeat(2, 1)
    assert (np.isnan(values) == ~mask).all()
    expected = np.where(mask, features.data.series.numpy(), np.nan)
    np.testing.assert_allclose(values, expected, atol=float(step.max()))
    heat = {key: unpacked(entry) for key, entry in data["heat"].items()}
    for latent in range(40):
        at = slice(heat["start"][latent], heat["start"][latent + 1])
        dense = np.zeros(30 * 16)
        dense[heat["slot"][at]] = (heat["share"][at].astype(float) - 1) / 254
        dense *= heat["largest"][latent]
        expected = np.nan_to_num(features.activity.of(latent)).ravel()
        np.testing.assert_allclose(dense, expected, atol=heat["largest"][latent] / 400 + 1e-7)
    assert set(heat["padded"]) == set(np.flatnonzero(~features.activity.observed))
    windows = {key: unpacked(entry) for key, entry in data["windows"].items()}
    for latent in range(40):
        at = slice(windows["start"][latent], windows["start"][latent + 1])
        frame = features.top_windows(latent).to_dataframe()
        assert (windows["slot"][at] == frame["series"] * 16 + frame["pos"]).all()
        np.testing.assert_allclose(windows["activation"][at], frame["activation"].astype(float))


def test_a_page_of_too_many_series_shows_a_sample_of_every_class_and_says_so(tmp_path, monkeypatch):
    from tstlens.figures.browser import pages as payload

    monkeypatch.setattr(payload, "MOST_SAMPLES", 12 * 2 * 16)
    features = features_of()
    data = data_of(features.to_html(tmp_path / "page.html"))
    assert len(data["series"]) == 12 and data["total"] == 30
    assert np.bincount(data["labels"]).tolist() == [4, 4, 4]
    windows = {key: unpacked(entry) for key, entry in data["windows"].items()}
    for latent in range(40):
        dense = np.nan_to_num(features.activity.of(latent)).max(2)[data["series"], 0]
        at = slice(windows["start"][latent], windows["start"][latent + 1])
        expected = np.sort(dense[dense > 0])[::-1][:9]
        np.testing.assert_allclose(windows["activation"][at], expected)


def test_text_cannot_break_out_of_the_page_and_nothing_is_loaded_from_elsewhere(tmp_path):
    features = features_of(names=(NASTY, "b", "c"))
    path = features.to_html(tmp_path / "page.html", title=NASTY)
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<img" not in text and "http://www.w3.org/2000/svg" in text
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert data_of(path)["classes"][0] == NASTY
    assert "default-src 'none'" in text


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    from tstlens import storage

    features = features_of()
    path = features.to_html(tmp_path / "deep" / "page.html")
    before = path.read_text(encoding="utf-8")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", broken)
    with pytest.raises(StorageError, match=r"page.html cannot be written: No space left"):
        features.to_html(path)
    assert path.read_text(encoding="utf-8") == before
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]


def test_errors_of_pages(tmp_path, no_shape_checks):
    features = features_of()
    with pytest.raises(StorageError, match="found a folder; name a file in it"):
        features.to_html(tmp_path)
    with pytest.raises(ArgumentError, match="n_windows as an integer of at least 1, got 0"):
        features.to_html(tmp_path / "x.html", n_windows=0)
    with pytest.raises(ArgumentError, match="expected a result with a page, got SimpleNamespace"):
        figures.page(SimpleNamespace(), tmp_path / "x.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chrome or Chromium on the path, and BROWSER_PATH is not set")
    one = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture
def opened(browser, tmp_path):
    def open_page(features, **options):
        browser.errors.clear()
        browser.requests.clear()
        path = features.to_html(tmp_path / "page.html", **options)
        browser.open(path.as_uri())
        return browser

    return open_page


def column(page, index):
    rows = "[...document.querySelectorAll('#latents tbody tr')]"
    return page.run(f"{rows}.map(row => row.cells[{index}].textContent)")


def visible(page, selector):
    return page.run(f"!document.querySelector({json.dumps(selector)}).hidden")


def test_it_loads_without_errors_and_a_click_opens_a_latent(opened):
    features = features_of()
    page = opened(features)
    active = int((features.activity.density > 0).sum())
    assert len(column(page, 0)) == active
    assert visible(page, "#index") and not visible(page, "#latent")
    first = int(column(page, 0)[0])
    page.click("#latents tbody tr td:nth-child(2)")
    page.wait("!document.querySelector('#latent').hidden")
    assert visible(page, "#latent") and not visible(page, "#index")
    assert page.run("document.querySelector('#latent h2').textContent") == f"Latent {first}"
    windows = features.top_windows(first)
    captions = page.run("[...document.querySelectorAll('figcaption span')].map(e => e.textContent)")
    assert captions == [f"series {w.series}, samples {w.start}–{w.stop - 1}" for w in windows]
    assert page.run("document.querySelectorAll('figure rect.window').length") == len(windows)
    assert page.run("document.querySelectorAll('.bars').length") == 2
    size = page.run("(c => [c.width, c.height])(document.querySelector('canvas'))")
    assert size == [16, 30]
    second = column(page, 0)[1]
    page.click("#next")
    page.wait(f"document.querySelector('#latent h2').textContent === 'Latent {second}'")
    page.click("#back")
    page.wait("!document.querySelector('#index').hidden")
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("file:")] == []


def test_headings_sort_and_sort_back(opened):
    features = features_of()
    page = opened(features)
    table = features.table()
    table = table[table["density"] > 0]
    page.click("th[data-key='density'] button")
    down = [int(one) for one in column(page, 0)]
    assert table.loc[down, "density"].is_monotonic_decreasing
    page.click("th[data-key='density'] button")
    up = [int(one) for one in column(page, 0)]
    assert table.loc[up, "density"].is_monotonic_increasing and up != down
    assert page.run("document.querySelector(\"th[data-key='density']\").ariaSort") == "ascending"
    page.click("th[data-key='property'] button")
    names = column(page, 7)
    assert names == sorted(
        names, key=lambda one: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", one)]
    )
    page.click("th[data-key='latent'] button")
    assert [int(one) for one in column(page, 0)] == list(table.index)
    assert page.errors == []


def test_search_finds_numbers_classes_and_properties_and_dead_latents_can_be_shown(opened):
    features = features_of()
    page = opened(features)
    table = features.table()
    active = table[table["density"] > 0]
    page.type("#search", "7")
    assert column(page, 0) == ["7"]
    page.type("#search", "level channel 1")
    expected = active["property"].str.contains("level").fillna(False) & active[
        "property"
    ].str.contains("channel 1").fillna(False)
    assert {int(one) for one in column(page, 0)} == set(active.index[expected])
    page.type("#search", "class 2")
    found = {int(one) for one in column(page, 0)}
    assert set(active.index[active["class"] == "class 2"]) <= found < set(active.index)
    page.type("#search", "no such thing")
    assert column(page, 0) == []
    assert page.run("document.getElementById('count').textContent") == "0 of 40 latents"
    page.type("#search", "")
    page.click("#alive")
    assert len(column(page, 0)) == 40
    assert page.errors == []


def test_text_from_the_data_stays_text(opened):
    page = opened(features_of(names=(NASTY, "b", "c")), title=NASTY)
    for latent in range(5):
        page.run(f"location.hash = '{latent}'")
        page.wait(f"document.title.startsWith('Latent {latent} ')")
    assert page.run("document.querySelector('h1').textContent") == NASTY
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.title") != "owned"
    assert page.errors == []


def test_rows_are_series_and_channels_where_channels_are_independent(opened):
    features = features_of(n_latents=6, channel_independent=True)
    page = opened(features)
    page.run("location.hash = document.querySelector('#latents tbody tr').dataset.row")
    page.wait("document.querySelector('canvas') !== null")
    assert page.run("document.querySelector('canvas').height") == 27
    assert "channel" in page.run("document.querySelector('figcaption').textContent")
    assert page.errors == []


def test_two_thousand_latents_open_quickly(opened):
    """A dictionary of 2,000 latents on 400 series of 128 positions, 16 active per position."""
    from tstlens.saes.reading import Activity, Features
    from tstlens.saes.reading.intervention import OutputEffects

    rng = np.random.default_rng(0)
    data = made.labelled(n=400, n_channels=3, n_time=128, n_classes=5)
    values = random_sparse(400 * 128, 2000, 16 / 2000, format="csc", random_state=rng)
    small = features_of()
    cells = tuple((t, t + 1) for t in range(128))
    activity = Activity(values.astype(np.float32), np.ones(400 * 128, dtype=bool), 400, 1, 128)
    change = rng.standard_normal((2000, 5))
    features = Features(
        activity=activity,
        data=data,
        spans=cells,
        cells=cells,
        directions=rng.standard_normal((2000, 64)).astype(np.float32),
        classes=None,
        properties=None,
        effects=OutputEffects("class", change, change / 9, change.std(1), np.full(2000, 8)),
        monosemanticity=small.monosemanticity,
        outputs=data.class_names,
        hook="blocks.0.hook_mlp_out",
    )
    page = opened(features)
    assert len(column(page, 0)) == 50  # drawn fifty at a time
    page.click("#more")
    assert len(column(page, 0)) == 100
    timed = "(() => { const t = performance.now(); %s; return performance.now() - t; })()"
    sort = page.run(timed % "document.querySelector(\"th[data-key='max'] button\").click()")
    first = page.run(timed % "openOne(1234)")
    again = page.run(timed % "openOne(77)")
    print(f"2,000 latents: sort {sort:.0f} ms, first latent {first:.0f} ms, next {again:.0f} ms")
    assert sort < 2000 and first < 4000 and again < 2000
    assert page.errors == []


def many(opened, n=130):
    """A page of ``n`` latents, copies of a few."""
    from tstlens.saes.reading import Activity

    small = features_of(n_latents=10)
    activity = small.activity
    values = csc_matrix(hstack([activity.values] * (n // 10)))
    shape = activity.n_series, activity.n_channels, activity.n_pos
    features = dataclasses.replace(
        small,
        activity=Activity(values, activity.observed, *shape),
        directions=np.random.default_rng(0).standard_normal((n, 8)).astype(np.float32),
        classes=None,
        properties=None,
        effects=None,
    )
    return opened(features)


def focused(page):
    """The text of the link that has the focus, else the id of the element."""
    return page.run(
        "document.activeElement.tagName === 'A' ? document.activeElement.textContent"
        " : document.activeElement.id || document.activeElement.tagName"
    )


def test_a_long_table_comes_in_parts_and_says_how_much_is_left(opened):
    page = many(opened)
    page.click("#alive")  # silent ones too
    foot = "document.getElementById('foot').innerText.replace(/\\s+/g, ' ').trim()"
    assert len(column(page, 0)) == 50
    assert page.run(foot) == "The first 50 of 130. Show 50 more Show all 130"
    page.click("#more")
    assert len(column(page, 0)) == 100 and focused(page) == column(page, 0)[50]
    assert page.run(foot) == "The first 100 of 130. Show 30 more"
    page.click("#more")
    assert len(column(page, 0)) == 130 and page.run(foot) == "All 130."
    page.type("#search", "no such latent")
    assert page.run(foot) == "No latents match the filter."
    page.type("#search", "")
    assert len(column(page, 0)) == 50
    page.click("#all")
    assert len(set(column(page, 0))) == 130 and focused(page) == column(page, 0)[50]
    assert page.errors == []


def test_everything_is_reached_with_the_keyboard(opened):
    page = many(opened)
    page.click("#alive")
    page.run("document.activeElement.blur()")
    page.press("/")
    assert focused(page) == "search" and page.run("document.activeElement.value") == ""
    page.press("ArrowDown", "ArrowDown", "ArrowDown")
    rows = column(page, 0)
    assert focused(page) == rows[2]
    page.press("End")
    assert focused(page) == rows[49]
    page.press("ArrowDown")  # draws the next part
    assert len(column(page, 0)) == 100 and focused(page) == column(page, 0)[50]
    page.press("Enter")
    page.wait("!document.querySelector('#latent').hidden")
    heading = "document.querySelector('#latent h2').textContent"
    rows = column(page, 0)
    assert page.run(heading) == f"Latent {rows[50]}" and focused(page) == "H2"
    for key, at in (("ArrowRight", 51), ("ArrowRight", 52), ("ArrowLeft", 51)):
        page.press(key)
        page.wait(f"{heading} === 'Latent {rows[at]}'")
    page.press("Escape")
    page.wait("document.querySelector('#latent').hidden")
    assert len(column(page, 0)) == 100 and focused(page) == rows[51]
    page.press("Home", "ArrowUp")
    assert focused(page) == "search"
    page.type("#search", "12")
    assert column(page, 0) == ["12"]
    page.press("Escape")
    assert len(column(page, 0)) == 50
    assert page.errors == [] and all(url.startswith("file:") for url in page.requests)


def test_latents_of_single_heads_have_a_column_and_are_found_by_head(opened):
    from tstlens.saes.reading import features

    model, data = made.per_step(), made.labelled(n=30)
    width = model.cfg.d_model // model.cfg.n_heads
    sae = made.random_dictionary(width, 6, "blocks.0.attn.hook_z", threshold=0.2)
    found = features(model, sae, data, n_permutations=100, effect_series=0, progress=False)
    table = found.table()
    page = opened(found)
    page.click("#alive")
    assert page.run("document.querySelectorAll('#latents th')[1].textContent") == "head"
    shown = dict(zip(column(page, 0), column(page, 1), strict=True))
    assert shown == {str(i): str(int(table["head"][i])) for i in table.index}
    page.type("#search", "head 1")
    assert {int(i) for i in column(page, 0)} == set(table.index[table["head"] == 1])
    first = column(page, 0)[0]
    page.run(f"location.hash = '{first}'")
    page.wait("!document.querySelector('#latent').hidden")
    facts = page.run("document.querySelector('.facts').textContent")
    assert facts.startswith(f"latent {int(first) % 6} at head 1 · ")
    assert page.errors == []

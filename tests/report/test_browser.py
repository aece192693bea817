"""The report as a reader meets it: in a real browser, headless, with mouse, keyboard and a phone's width."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from artefacts import write_embeddings, write_pool

from curate.cluster.cluster import ClusterOptions, cluster
from curate.engine import Job
from curate.report.report import ReportOptions, report
from curate.select.select import SelectOptions, select
from curate.storage import manifest
from house import ROOT, curate

QUIET = Job(workers=1, quiet=True)
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> dog"
STEPS = ("dedup(0.97)", "rank(clip_score, 0.2, 0.8)", "above(centroid_similarity, 0.5)", "sample(20)")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1000"
)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
wait = pytest.importorskip("selenium.webdriver.support.wait", reason="selenium is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
VISITS = itertools.count()
PATIENCE_S = 120  # what a machine under load may take; nothing here waits longer than it must
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no chromium with its chromedriver here")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline's directory with a page about it."""
    home = tmp_path_factory.mktemp("browser")
    pool = write_pool(home / "pool", ["a", "b"], 90, caption=lambda row: f"{EVIL} {row}")
    emb = write_embeddings(home / "embeddings", pool, dim=6)
    cluster(emb, str(home / "clusters"), ClusterOptions(k=4), QUIET)
    select(str(home / "clusters"), str(home / "selection"), SelectOptions(steps=STEPS), QUIET)
    report(str(home), str(home / "report.html"), ReportOptions(), QUIET)
    return home


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, tmp_path):
    """The browser as it started, whatever the test before left; at the end no page may have had an error."""
    for command, values in (
        ("Emulation.setScriptExecutionDisabled", {"value": False}),
        ("Emulation.clearDeviceMetricsOverride", {}),
        ("Emulation.setEmulatedMedia", {"features": []}),
        ("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}),
    ):
        driver.execute_cdp_cmd(command, values)
    driver.get_log("browser")
    yield driver
    assert driver.get_log("browser") == []


def until(browser, condition):
    """Wait for a condition of the browser; returns its value."""
    return wait.WebDriverWait(browser, PATIENCE_S, 0.05).until(condition)


def visit(browser, path):
    """Open a page and wait until it stands there whole: `get` alone may come back while the page before is shown."""
    url = f"{Path(path).as_uri()}?{next(VISITS)}"
    browser.get(url)
    state = "return [document.URL, document.readyState]"
    until(browser, lambda browser: browser.execute_script(state) == [url, "complete"])


@pytest.fixture
def page(browser, home):
    visit(browser, home / "report.html")
    return browser


def part(page, cut, name):
    return page.find_element("css selector", f'#{cut} [data-part="{name}"]')


def stays(page, cut):
    return int(part(page, cut, "stay").text.replace(",", ""))


def test_hostile_captions_run_nothing_and_nothing_is_fetched(page):
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert page.execute_script("return document.scripts.length") == 2
    assert page.execute_script("return document.querySelectorAll('img:not([src^=\"data:image/jpeg\"])').length") == 0
    assert "alert(1)" in page.find_element("id", "kept").text
    broken = "return [...document.images].filter(i => { i.loading = 'eager'; return false; }).length"
    assert page.execute_script(broken) == 0


@pytest.mark.parametrize(
    "cut, end, keys", [("dedup", "high", 11), ("cut0", "low", 17), ("cut0", "high", 9), ("cut1", "low", 9)]
)
def test_the_number_at_a_moved_slider_is_what_select_gives(page, home, tmp_path, cut, end, keys):
    slider, before = part(page, cut, end), stays(page, cut)
    for _ in range(keys):
        slider.send_keys("\ue012" if end == "high" else "\ue014")  # left, right
    after, step = stays(page, cut), part(page, cut, "step").text
    assert after != before and str(after) in slider.get_attribute("aria-valuetext").replace(",", "")
    words = shlex.split(part(page, cut, "again").text)
    assert words[:4] == ["curate", "select", "clusters", "selection-moved"] and step in words
    steps = [word for word, flag in zip(words[1:], words, strict=False) if flag == "--step"]
    select(str(home / "clusters"), str(tmp_path / "sel"), SelectOptions(steps=tuple(steps)), QUIET)
    funnel = manifest.load_json(str(tmp_path / "sel" / "funnel.json"))
    assert funnel["steps"][steps.index(step)]["kept"] == after
    part(page, cut, "reset").click()
    assert stays(page, cut) == before and not part(page, cut, "again").is_displayed()


def test_the_command_on_the_page_runs_as_it_stands(page, home):
    part(page, "cut0", "low").send_keys("\ue014" * 3)
    after = stays(page, "cut0")
    words = shlex.split(part(page, "cut0", "again").text)
    made = json.loads(curate(*words[1:], "--json", cwd=home).stdout)
    assert made["funnel"][1]["kept"] == after


def test_a_dragged_line_moves_with_the_mouse(page):
    actions = webdriver.ActionChains(page)
    line = page.find_element("css selector", '#cut0 .grip[data-end="low"] .knob')
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", line)
    before, x = stays(page, "cut0"), line.rect["x"]
    actions.move_to_element(line).click_and_hold().move_by_offset(-60, 5).release().perform()
    assert stays(page, "cut0") > before and abs(line.rect["x"] - x + 60) < 12
    kept = stays(page, "cut0")
    actions.move_by_offset(40, 0).perform()  # no longer held
    assert stays(page, "cut0") == kept
    lower, upper = (int(part(page, "cut0", end).get_attribute("value")) for end in ("low", "high"))
    for _ in range(2):
        part(page, "cut0", "low").send_keys("\ue010")  # end: past the upper line
    assert int(part(page, "cut0", "low").get_attribute("value")) == upper - 1 > lower


def test_the_keyboard_alone_suffices(page):
    def press(key):
        webdriver.ActionChains(page).send_keys(key).perform()
        return page.execute_script("const e = document.activeElement; return e.dataset.part || e.id || e.innerText")

    colour = "return getComputedStyle(document.body).backgroundColor"
    tab, before = "\ue004", page.execute_script(colour)
    reached = [press(tab)]
    while len(reached) < 40 and reached[-1] != "high":
        reached.append(press(tab))
        if reached[-1] == "theme":
            press(" ")
    assert reached[0] == "Skip to the content" and "theme" in reached and reached[-1] == "high"
    assert page.execute_script(colour) != before
    kept = stays(page, "dedup")
    press("\ue011")  # home
    assert stays(page, "dedup") < kept


def test_it_reads_on_a_phone_and_in_the_dark(page):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    small = (
        "return [...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().height < 11).length"
    )
    assert page.execute_script(small) == 0
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    colours = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        colours.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


FAINT = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const read = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] / 255 + below[i] * (1 - top[3] / 255));
const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const part = colour[i] / 255;
  return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
}, 0);
const behind = (element) => element
  ? over(read(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [255, 255, 255];
return [...document.querySelectorAll("body *:not(script)")].filter((element) =>
  [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
  && element.getBoundingClientRect().width).filter((element) => {
    const style = getComputedStyle(element), ground = behind(element);
    const ink = over(read(element.namespaceURI.endsWith("svg") ? style.fill : style.color), ground);
    const [dark, bright] = [light(ink), light(ground)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05) < 4.5;
  }).map((element) => element.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(page, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert page.execute_script(FAINT) == []


def test_without_scripts_it_reads_and_offers_nothing_that_cannot_be_moved(browser, home):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    visit(browser, home / "report.html")
    assert "keeps" in browser.find_element("css selector", "#cut0 .readout").text
    shown = [e for e in browser.find_elements("css selector", "button, input, #drag") if e.is_displayed()]
    assert shown == []


@pytest.mark.parametrize("name", ["embeddings", "clusters", "selection", "ablation"])
def test_a_page_about_any_directory_opens_without_errors(browser, home, tmp_path, name):
    if name == "ablation":
        (home / name).mkdir(exist_ok=True)
        text = (ROOT / "curate" / "README.md").read_text().split("### ablations")[1]
        (home / name / "ablation.json").write_text(re.search(r"```json\n(.*?)```", text, flags=re.S)[1])
    report(str(home / name), str(tmp_path / "page.html"), ReportOptions(), QUIET)
    visit(browser, tmp_path / "page.html")
    assert browser.execute_script(FAINT) == []


def downloaded(browser, folder):
    """Wait for the file of marked keys; returns its labels."""
    from curate.ask.probe import read_labels

    file = folder / "marked.tsv"
    until(browser, lambda _: file.exists() and file.stat().st_size)
    return read_labels(str(file))


def test_pictures_of_the_report_are_marked_and_make_a_head(page, home, tmp_path):
    """Look, mark, fit, select: the loop closes."""
    from curate.ask.probe import probe

    boxes = {}
    for box in page.find_elements("css selector", "#kept input.mark, #dropped input.mark"):
        boxes.setdefault(box.get_attribute("data-key"), box)
    assert len(boxes) >= 10 and all(box.is_displayed() for box in boxes.values())
    label = page.find_element("id", "label")
    expected = dict(zip(boxes, ["dog", "none"] * 5, strict=False))
    for key, name in expected.items():
        label.clear()
        label.send_keys(name)
        page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", boxes[key])
        boxes[key].send_keys(" ")
    same = page.find_elements("css selector", f'input.mark[data-key="{next(iter(expected))}"]')
    assert all(box.is_selected() for box in same)
    assert page.find_element("id", "marked").text == "10 marked"
    page.find_element("id", "download").click()
    assert downloaded(page, tmp_path) == expected
    head = tmp_path / "head.safetensors"
    probe(str(home / "clusters"), str(tmp_path / "marked.tsv"), str(head), 3)
    step = f'below(head("{head}", "dog"), 0.99)'
    assert select(str(home / "clusters"), str(tmp_path / "sel"), SelectOptions(steps=(step,)), QUIET)["counts"]["kept"]


def test_marked_keys_are_downloaded(browser, home, tmp_path):
    from curate.ask.find import Hit
    from curate.report import found

    embedded = manifest.open_input(str(home / "embeddings"))
    hits = [
        Hit(0.5 - row / 100, "a", row, {"key": f"{row:09d}", "caption": EVIL, "kept": row < 2, "dropped_by": "x"})
        for row in range(4)
    ]
    (tmp_path / "found.html").write_bytes(found.page(embedded, {EVIL: hits, "again": hits[:2]}, EVIL))
    visit(browser, tmp_path / "found.html")
    boxes = browser.find_elements("css selector", ".mark")
    assert len(boxes) == 6 and len(browser.find_elements("css selector", ".card img")) == 6
    boxes[1].click()
    assert boxes[5].is_selected()  # the same key, under the other question
    label = browser.find_element("id", "label")
    label.clear()
    label.send_keys("good")
    boxes[3].click()
    boxes[0].click()
    boxes[0].click()
    assert browser.find_element("id", "marked").text == "2 marked"
    browser.find_element("id", "download").click()
    assert downloaded(browser, tmp_path) == {"000000001": "yes", "000000003": "good"}

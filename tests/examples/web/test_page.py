"""`examples/web`: the page finds in headless Chromium what onnxruntime finds in Python."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rectangles import Rectangles, new_teacher

from crosskd_assign import EndToEndDetector
from tests.third_party.makers import awake

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

WEB = Path(__file__).parents[3] / "examples" / "web"
NAMES = {0: "red", 1: "green", 2: "blue"}
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1280,900"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The page beside two exports of one student, of open and of fixed size."""
    pytest.importorskip("onnxruntime")
    from crosskd_assign.export import export_onnx

    if not (WEB / "vendor").is_dir():
        pytest.skip("onnxruntime-web is not there: run make web")
    folder: Path = tmp_path_factory.mktemp("site")
    for path in WEB.iterdir():
        if path.suffix in {".html", ".css", ".js"} or path.name == "vendor":
            (folder / path.name).symlink_to(path)
    adapter = awake(new_teacher(seed=3))
    adapter.model.head[-1].weight.data *= 2  # scores of all sizes
    detector = EndToEndDetector(adapter.eval(), top_k=40)
    export_onnx(detector, folder / "open.onnx", class_names=NAMES, metadata={"score_threshold": "0.55"})
    export_onnx(detector, folder / "fixed.onnx", image_size=(96, 160), batch_size=1, preprocessing="outside")
    (folder / "broken.onnx").write_bytes(b"no model")
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """What ``python -m http.server`` serves."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not there")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def until(browser: Any, script: str) -> Any:
    """Wait for a script to return something."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda chrome: chrome.execute_script(f"return {script}"))


def text(browser: Any, name: str) -> str:
    found: str = browser.find_element("id", name).text
    return found


def slide(browser: Any, value: float) -> None:
    script = (
        "const s = document.getElementById('threshold'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, value)


def picture(path: Path, width: int, height: int) -> np.ndarray:
    """A PNG, which loses nothing, and its pixels ``(3, H, W)`` in 0…1."""
    tiles = Rectangles(9, seed=4).images
    whole = torch.cat([torch.cat(tiles[row : row + 3], dim=2) for row in (0, 3, 6)], dim=1)
    pixels = (whole[:, :height, :width] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
    return np.asarray(pixels.transpose(2, 0, 1), np.float32) / 255


def expected(model: Path, images: np.ndarray) -> tuple[np.ndarray, ...]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return tuple(output[0] for output in session.run(None, {"images": images[None]}))


def assert_same(found: list[dict[str, Any]], model: Path, images: np.ndarray, frame: tuple[int, int]) -> None:
    boxes, scores, labels = expected(model, images)
    assert len(found) == len(scores)
    assert scores.std() > 0.05
    np.testing.assert_allclose([d["score"] for d in found], scores, atol=1e-4)
    np.testing.assert_allclose([d["box"] for d in found], np.clip(boxes, 0, np.tile(frame, 2)), atol=0.5)
    assert [d["label"] for d in found] == labels.tolist()


def test_the_page_finds_what_onnxruntime_finds_and_the_slider_filters_without_running_again(
    site, address, browser, tmp_path
):
    images = picture(tmp_path / "picture.png", 150, 100)
    browser.get(f"{address}?model=open.onnx")
    until(browser, "document.getElementById('about').textContent.includes('3 class names')")
    assert "pictures of any size" in text(browser, "about")
    browser.find_element("id", "picture").send_keys(str(tmp_path / "picture.png"))
    found = until(browser, "window.detections")
    assert_same(found, site / "open.onnx", images, (150, 100))
    assert {d["name"] for d in found} == {NAMES[d["label"]] for d in found}
    assert browser.execute_script("return document.getElementById('threshold').value") == "0.55"  # of the file

    browser.execute_script("window.detections.first = true")  # a second run would put others in their place
    counts = []
    for least in (0, 0.55, 0.7, 1):
        slide(browser, least)
        above = sum(d["score"] >= least for d in found)
        counts.append(above)
        assert text(browser, "status") == f"{above} of {len(found)} detections shown."
        assert len(browser.find_elements("css selector", "#list li")) == above
    assert counts[0] == 40
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0
    assert browser.execute_script("return window.detections.first")


def test_a_model_of_fixed_size_gets_pictures_padded_with_its_mean_colour(site, address, browser, tmp_path):
    images = picture(tmp_path / "low.png", 160, 64)
    browser.get(address)
    browser.find_element("id", "model").send_keys(str(site / "fixed.onnx"))
    until(browser, "document.getElementById('about').textContent.includes('160 × 96, no class names')")
    browser.find_element("id", "picture").send_keys(str(tmp_path / "low.png"))
    padded = np.full((3, 96, 160), 0.3, np.float32)  # image_mean of the detector
    padded[:, :64] = images
    found = until(browser, "window.detections")
    assert_same(found, site / "fixed.onnx", padded, (160, 64))
    assert found[0]["name"] == f"class {found[0]['label']}"

    # A picture of twice the size has the same objects, at twice their places.
    large = Image.open(tmp_path / "low.png").resize((320, 128), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.png")
    browser.execute_script("window.detections = null")
    browser.find_element("id", "picture").send_keys(str(tmp_path / "large.png"))
    doubled = until(browser, "window.detections")
    assert doubled[0]["label"] == found[0]["label"]
    np.testing.assert_allclose(doubled[0]["box"], 2 * np.array(found[0]["box"]), atol=8)


def test_pictures_are_dropped_and_drawn(address, browser, site):
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(site / "dropped.png")
    browser.get(f"{address}?model=open.onnx")
    drop = """
    const done = arguments[0], data = new DataTransfer();
    fetch("dropped.png").then((answer) => answer.blob()).then((blob) => {
      data.items.add(new File([blob], "dropped.png", { type: "image/png" }));
      document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
      done(true);
    });"""
    assert browser.execute_async_script(drop)
    until(browser, "window.detections")
    shape = "document.getElementById('canvas').width / document.getElementById('canvas').height"
    assert browser.execute_script(f"return {shape}") == 60 / 40
    browser.execute_script("window.detections = null")
    browser.find_element("id", "example").click()
    until(browser, "window.detections")
    assert browser.execute_script(f"return {shape}") == 320 / 240


@pytest.mark.parametrize(
    ("query", "name", "file", "sentence"),
    [
        ("?model=none.onnx", None, None, "There is no model at none.onnx on this server."),
        ("", "model", "broken.onnx", "broken.onnx is no model that onnxruntime can load"),
        ("", "model", "other.onnx", "other.onnx has the outputs y. This page needs boxes, scores and labels"),
        ("", "picture", "broken.onnx", "broken.onnx is no model that onnxruntime can load"),
        ("", "picture", "text.png", "text.png is no picture that this browser can read."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(query, name, file, sentence, site, address, browser):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Identity", ["images"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [1]) for end in ("images", "y")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), site / "other.onnx")
    (site / "text.png").write_text("no picture")
    browser.get(f"{address}{query}")
    if name is not None:
        browser.find_element("id", name).send_keys(str(site / file))
    until(browser, "!document.getElementById('error').hidden")
    assert text(browser, "error").startswith(sentence)


def test_without_the_runtime_the_page_says_how_to_get_it(site, address, browser):
    (site / "bare").mkdir(exist_ok=True)
    for path in WEB.iterdir():
        if path.suffix in {".html", ".css", ".js"} and not (site / "bare" / path.name).exists():
            (site / "bare" / path.name).symlink_to(path)
    browser.get(address.replace("index.html", "bare/index.html"))
    until(browser, "!document.getElementById('error').hidden")
    assert text(browser, "error").startswith("onnxruntime-web is missing. Run npm ci")


def test_every_control_has_a_label_and_nothing_overflows_on_a_phone(site, address, browser):
    browser.get(f"{address}?model=open.onnx")
    browser.find_element("id", "example").click()
    until(browser, "window.detections")
    unnamed = "[...document.querySelectorAll('input')].filter((input) => !input.labels.length).length"
    assert browser.execute_script(f"return {unnamed}") == 0
    for width, height in ((390, 844), (1280, 900)):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.save_screenshot(str(site / f"{width}.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_file_says_its_metadata_to_a_reader_of_its_own(site, browser, address):
    import onnx

    browser.get(address)
    script = """
    const done = arguments[1];
    import("./metadata.js").then(async ({ readMetadata }) => {
      const answer = await fetch(arguments[0]);
      done(readMetadata(new Uint8Array(await answer.arrayBuffer())));
    });"""
    for name in ("open.onnx", "fixed.onnx"):
        stored = {entry.key: entry.value for entry in onnx.load(site / name).metadata_props}
        assert json.loads(json.dumps(browser.execute_async_script(script, name))) == stored
    assert torch.__version__ in stored.values()

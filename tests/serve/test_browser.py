"""The page itself, in a browser without a network."""

import contextlib
import functools
import http.server
import io
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from flexmemory.serve.explorer import create_app
from flexmemory.serve.export import write_export
from tests.serve.conftest import find_chromium

ARGUMENTS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]
PAGES = {
    "T300": "on the vocabulary",
    "T300?layer=2": "Keys of layer 2",
    "L1K17": "Tokens it fires on",
    "L1K17?all=1": "fewer",
    "map": "Neighbours on a map",
    "map?color=cluster&layer=2&space=embedding": "Neighbours on a map",
    "map?color=norm&layer=1": "‖row‖, layer 1",
    "map?color=diff&with=other": "changed, the most first",
    "map?color=diff&with=doubled.safetensors&layer=1": "1 changed, the most first",
    "clusters": "4 clusters of layer 0",
    "clusters/2/1": "Cluster 1 of layer 2",
    "layers": "What sticks out",
    "layers?layer=1&by=max": "Keys of layer 1",
    "prompt?text=the+red+dog&alphas=1,0,1": "What adds to its logit",
    "edit?op=scale_value&key=L1K17": "Applied in memory",
    "edit?op=patch&patch=doubled.safetensors": "set rows of tokens 262 in layer 1",
    "diff": "Tokens that changed most",
    "diff?with=store": "Tokens that changed most",
    "diff?with=other&token=300": "Its row in every layer",
}
"""Addresses, and what the page then says."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def address(explored) -> Iterator[str]:
    """A server of the nano explorer."""
    app = create_app(
        explored.records, explored.live, checkpoint=explored.checkpoint, name="nano", compare=explored.compared
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page that must say nothing to the console and ask nothing of other hosts."""
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.set_default_timeout(15_000)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.said = said
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:"))] == []


def open_page(page, address: str, path: str, text: str) -> None:
    page.goto(f"{address}#/{path}")
    page.wait_for_function("text => document.getElementById('main').innerText.includes(text)", arg=text)


def colors_of(page) -> int:
    """Distinct colours of the map."""
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(page.locator("canvas").screenshot()))
    return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_by_its_address(page, address, scheme):
    page.emulate_media(color_scheme=scheme)
    for path, text in PAGES.items():
        open_page(page, address, path, text)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than the window"
        assert page.locator(".problem").count() == 0, path
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert "exact over" in page.locator("#footer").inner_text()
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme


def test_search_by_keyboard(page, address):
    open_page(page, address, "layers", "What sticks out")
    page.keyboard.press("/")
    page.keyboard.type("dog")
    first = page.locator("#found li").first
    first.wait_for()
    assert "dog" in first.inner_text()
    count = page.locator("#found li").count()
    if count > 1:
        page.keyboard.press("ArrowDown")
        assert page.locator("#found li[aria-selected=true]").inner_text() != first.inner_text()
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_function("() => /^#\\/T\\d+$/.test(location.hash) && document.title.includes('dog')")
    page.keyboard.press("/")
    page.keyboard.type("L2K5")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.title.startsWith('L2K5')")
    page.go_back()
    page.wait_for_function("() => document.title.includes('dog')")


def test_the_map_is_drawn_and_can_be_chosen_from(page, address):
    open_page(page, address, "map", "Neighbours on a map")
    page.wait_for_timeout(300)
    assert colors_of(page) > 50
    box = page.locator("canvas").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.keyboard.down("Shift")
    page.mouse.move(middle[0] - 200, middle[1] - 200)
    page.mouse.down()
    for dx, dy in ((200, -200), (200, 200), (-200, 200), (-200, -200)):
        page.mouse.move(middle[0] + dx, middle[1] + dy)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.locator(".chosenlist .tok").first.wait_for()
    page.mouse.move(*middle)
    page.mouse.wheel(0, -600)
    page.wait_for_function("() => location.hash.includes('at=')")


def test_edit_from_preview_to_take_back(page, address):
    open_page(page, address, "edit?op=scale_row&token=262&layer=1", "Applied in memory")
    page.locator("#preview").click()
    page.locator(".verdict").get_by_text("No other token").wait_for()
    page.locator("#apply").click()
    page.locator("#notice").get_by_text("1 edit is applied").wait_for()
    open_page(page, address, "diff?with=edits+applied+here", "1 changed at all")
    open_page(page, address, "edit", "Take back the last")
    with page.expect_download() as saved:
        page.get_by_text("Save as a patch").click()
    assert saved.value.suggested_filename == "nano.patch.safetensors"
    page.locator("#revert").click()
    page.get_by_text("bit for bit").wait_for()
    assert page.locator("#notice").is_hidden()


def test_a_patch_file_is_chosen_or_dropped_and_says_what_it_does(page, address, explored, tmp_path):
    open_page(page, address, "edit?op=patch", "Applied in memory")
    page.locator("#patchfile").set_input_files(explored.patch)
    page.locator(".verdict").get_by_text("other tokens' rows move").wait_for()
    page.get_by_text("Goes on").wait_for()
    page.locator("#apply").click()
    page.locator("#notice").get_by_text("1 edit is applied").wait_for()
    open_page(page, address, "map?color=diff&with=edits+applied+here&layer=1", "1 changed, the most first")
    open_page(page, address, "edit?op=patch", "Take back the last")
    page.locator("#revert").click()
    page.get_by_text("bit for bit").wait_for()
    drop = """([name, bytes]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], name));
        const event = new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
        document.querySelector(".page").dispatchEvent(event);
    }"""
    page.evaluate(drop, ["cut.safetensors", list(explored.patch.read_bytes()[:-10])])
    page.locator(".problem").get_by_text("cut.safetensors cannot be read as a patch").wait_for()
    assert page.said.pop().startswith("Failed to load resource"), "the browser's own line about the refusal"
    page.evaluate(drop, ["ours.safetensors", list(explored.patch.read_bytes())])
    page.locator(".verdict").get_by_text("other tokens' rows move").wait_for()
    assert "op=patch" in page.url


def test_addresses_of_nothing_say_so(page, address):
    for path in (
        "T99999",
        "L9K1",
        "L1K999",
        "clusters/1",
        "clusters/0/99",
        "nowhere",
        "layers?layer=9",
        "layers?layer=1&by=x",
    ):
        page.goto(f"{address}#/{path}")
        page.locator(".problem").wait_for()
        page.goto(f"{address}#/layers")
        page.get_by_text("What sticks out").wait_for()


def test_an_export_opens_from_any_server(page, explored, tmp_path):
    write_export(explored.records, explored.live, tmp_path / "out", name="nano")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # one connection for many files, as web servers have it

        def log_message(self, format, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128  # of the 5 by default a busy machine loses connections
        daemon_threads = True  # connections that are kept wait for no one

    handler = functools.partial(Quiet, directory=tmp_path / "out")
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            for path, text in PAGES.items():
                live = path.startswith(("prompt", "edit", "diff", "map?color=diff"))
                open_page(page, address, path, "needs the model" if live else text)
                assert page.locator(".problem").count() == int(live), path

"""The live page in a real browser: layout, keyboard, screen readers, and the command around it."""

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from affect_demos._hub import Hub
from affect_demos._web import WebSettings, serve
from affect_demos.dashcam import demo_clip

SIZES = {"phone": (360, 740), "desktop": (1280, 800)}
DEADLINE_MS = 20_000
CHROMIUM = "/usr/bin/chromium"
expect.set_options(timeout=DEADLINE_MS)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert Path(CHROMIUM).exists(), f"{CHROMIUM} is missing; Debian: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, size: str = "desktop", **context: Any) -> Iterator[Page]:
    """A page without errors: whatever the console says, a broken security policy included, fails the test."""
    width, height = SIZES[size]
    made = browser.new_context(viewport={"width": width, "height": height}, **context)
    made.set_default_timeout(DEADLINE_MS)
    page = made.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    try:
        yield page
        # A page whose program has ended goes on asking for it.
        assert [text for text in said if "ERR_CONNECTION_REFUSED" not in text] == []
    finally:
        made.close()


class Command:
    """`affect-dashcam ... --live` as a person starts it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "affect_demos.dashcam", *arguments, "--live", "--port", "0"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)
        assert self._process.stdout is not None
        self.lines = [self._process.stdout.readline().strip(), self._process.stdout.readline().strip()]
        assert self.lines[0].startswith("affect-dashcam: http://"), self._process.communicate()
        self.url = self.lines[0].removeprefix("affect-dashcam: ")

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        """Ctrl-C: exit code, and the rest of what it said."""
        self._process.send_signal(number)
        out, err = self._process.communicate(timeout=30)
        return self._process.returncode, out, err

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo clip to and fro for two minutes; beside it short.mp4, its beginning."""
    import cv2

    reader = cv2.VideoCapture(str(demo_clip()))
    frames = [frame for more, frame in iter(reader.read, (False, None)) if more]
    folder = tmp_path_factory.mktemp("clip")
    for name, shown in (("drive.mp4", (frames + frames[::-1]) * 15), ("short.mp4", frames[:40])):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter.fourcc(*"mp4v"), 29.97, (176, 144))
        for frame in shown:
            writer.write(frame)
        writer.release()
    return folder / "drive.mp4"


@pytest.fixture(scope="module")
def playing(long_clip: Path) -> Iterator[Command]:
    """The shipped student on the clip; its folder stays empty, because nothing is recorded."""
    folder = long_clip.parent / "cwd"
    folder.mkdir()
    with Command(folder, str(long_clip)) as command:
        yield command
        code, _, err = command.end()
    assert (code, err) == (0, "")
    assert list(folder.iterdir()) == []


def grown(page: Page, before: int) -> None:
    """Waits for more pictures."""
    page.wait_for_function("n => Number(document.documentElement.dataset.pictures) > n", arg=before)


def pictures(page: Page) -> int:
    return int(page.evaluate("Number(document.documentElement.dataset.pictures || 0)"))


def pixels(page: Page) -> str:
    return str(page.evaluate("document.getElementById('picture').toDataURL()"))


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("size", SIZES)
def test_it_lives_and_fits_and_is_accessible(browser: Browser, playing: Command, size: str, scheme: Any) -> None:
    with opened(browser, playing.url, size, color_scheme=scheme) as page:
        expect(page.locator("#state")).to_have_text("Playing")
        expect(page.locator("#recording")).to_be_hidden()
        expect(page.locator("#not-recording")).to_be_visible()
        expect(page.locator("#untrained")).to_be_hidden()
        expect(page.locator("#faces")).to_have_text("1 face")
        grown(page, 0)
        before = {name: page.locator(name).text_content() for name in ("#clock", "#valence", "#share")}
        image, count = pixels(page), pictures(page)
        grown(page, count + 5)
        for name, text in before.items():
            expect(page.locator(name)).not_to_have_text(text or "")
        assert pixels(page) != image
        expect(page.locator("#stages tr")).to_have_count(4)
        expect(page.locator("#stages td").last).not_to_have_text("\N{EN DASH}")
        page.locator("summary").click()
        expect(page.locator("#rows tr")).to_have_count(4)
        # The whole page is within its width, and so is everything on it.
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        assert page.evaluate(f"{wide}.map(e => e.id || e.className)") == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for text in ("driver safety", "not a feeling, a diagnosis, or evidence", "AI Act, article 5(1)(f)"):
            assert text in page.inner_text("body")
        found = Axe().run(page, options={"resultTypes": ["violations", "passes"]}).response
        assert [(f["id"], [node["html"] for node in f["nodes"]]) for f in found["violations"]] == []
        assert {"color-contrast", "button-name", "region"} <= {f["id"] for f in found["passes"]}


def test_the_keyboard_reaches_everything_and_pauses(browser: Browser, playing: Command) -> None:
    with opened(browser, playing.url) as page, opened(browser, playing.url) as clock:
        expect(page.locator("#faces")).to_have_text("1 face")
        order = []
        for _ in range(5):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", order  # focus can be seen
        assert order == ["To the driver's state", "pause", "The same as a table", "events", "Download summary"]
        page.keyboard.press("Shift+Tab")
        page.locator("#pause").focus()
        for key, pressed in (("Enter", "true"), ("Space", "false"), ("Space", "true")):
            page.keyboard.press(key)
            expect(page.locator("#pause")).to_have_attribute("aria-pressed", pressed)
        stood, frozen = page.locator("#clock").text_content() or "", pixels(page)
        # Another page tells that the program goes on.
        grown(clock, pictures(clock) + 15)
        expect(clock.locator("#clock")).not_to_have_text(stood)
        assert page.locator("#clock").text_content() == stood and pixels(page) == frozen
        page.keyboard.press("Enter")
        expect(page.locator("#clock")).not_to_have_text(stood)
        grown(page, pictures(page))


def test_expressions_are_announced_politely(browser: Browser, playing: Command) -> None:
    watch = """() => {
        window.said = [];
        const note = document.getElementById("announce");
        new MutationObserver(() => said.push([performance.now(), note.textContent])).observe(note, { childList: true });
    }"""
    with opened(browser, playing.url) as page:
        page.evaluate(watch)
        page.wait_for_function("() => said.length >= 2")
        said = page.evaluate("said")
        assert all(text.startswith("Face 0: ") for _, text in said)
        # Four seconds apart, less the tick of a timer.
        assert all(after - before > 3900 for (before, _), (after, _) in itertools.pairwise(said))
        note = page.locator("#announce")
        assert note.get_attribute("aria-live") == "polite" and note.get_attribute("role") == "status"


def test_the_summary_can_be_downloaded(browser: Browser, playing: Command) -> None:
    with opened(browser, playing.url) as page:
        with page.expect_download() as download:
            page.get_by_role("link", name="Download summary").click()
        assert download.value.suggested_filename == "affect-summary.json"
        summary = json.loads(Path(download.value.path()).read_text())
        assert summary["made_by"] == "affect-dashcam" and summary["faces"] >= 1 and "held_share" in summary


def test_the_end_of_a_recording_and_its_record(browser: Browser, long_clip: Path, tmp_path: Path) -> None:
    with Command(tmp_path, str(long_clip.with_name("short.mp4")), "--record", "kept", "--token", "auto") as command:
        assert command.lines[1] == "affect-dashcam: recording to kept; Ctrl-C ends"
        with opened(browser, command.url) as page:
            expect(page.locator("#recording")).to_be_visible()
            expect(page.locator("#kept")).to_have_text("Recorded to kept on the device.")
            assert "token" not in page.url  # it has been taken out of the address bar ...
            page.reload()  # ... and the cookie does
            expect(page.locator("#state")).to_have_text("Ended")
            expect(page.locator("#words")).to_contain_text("The recording is over")
            expect(page.locator("#facts dd").first).to_have_text("0:01")
            files = sorted(path.name for path in (tmp_path / "kept").iterdir())  # whole at the end already
            assert files == ["annotated.mp4", "summary.json", "timeline.csv", "timeline.png"]
        assert command.end()[0] == 0


def test_a_stranger_sees_nothing_and_ctrl_c_leaves_the_record_whole(
    browser: Browser, long_clip: Path, tmp_path: Path
) -> None:
    """The command itself behind a token: refused without, let in with it, and ended in the middle of its record."""
    import cv2

    with Command(
        tmp_path, str(long_clip), "--token", "a-long-enough-token", "--record", str(tmp_path / "kept")
    ) as command:
        assert command.url.endswith("/?token=...")  # one that was given is not printed
        address = command.url.partition("?")[0]
        stranger = browser.new_page()
        answer = stranger.goto(address)
        assert answer is not None and answer.status == 401
        stranger.close()
        with opened(browser, f"{address}?token=a-long-enough-token") as page:
            grown(page, 0)
            assert page.evaluate("document.cookie") == ""  # HttpOnly
            code, out, err = command.end()
            assert (code, err) == (0, "") and "written: " in out
            expect(page.locator("#state")).to_have_text("Disconnected")
            expect(page.locator("#words")).to_contain_text("The program was ended")
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
        summary = json.loads((tmp_path / "kept" / "summary.json").read_text())
        reader = cv2.VideoCapture(str(tmp_path / "kept" / "annotated.mp4"))
        assert sum(1 for more, _ in iter(reader.read, (False, None)) if more) == summary["frames"] > 0
        reader.release()


# ---- what the shipped student does not show, told to the page as the recogniser would tell it


@pytest.fixture
def told() -> Iterator[tuple[Hub, str]]:
    """A hub behind a server in a thread of its own."""
    hub, up, ended = Hub(), threading.Event(), asyncio.Event()
    at: dict[str, Any] = {}

    async def run() -> None:
        at["loop"] = asyncio.get_running_loop()
        async with serve(WebSettings.of("127.0.0.1", 0, None), hub, dict) as url:
            at["url"] = url
            up.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert up.wait(20)
    yield hub, at["url"]
    at["loop"].call_soon_threadsafe(ended.set)
    thread.join()


def about(**changes: Any) -> dict[str, Any]:
    facts = {"model": "student", "target": "cpu", "trained": True, "purpose": "For safety.", "source": "camera 0"}
    return facts | {"live": True, "record": None, "least_eyes_s": 30.0, "drowsy": 0.15} | changes


def face(**changes: Any) -> dict[str, Any]:
    shown = {"id": 0, "box": [30.0, 20.0, 60.0, 60.0], "main": True, "held": False, "drowsy": False}
    return shown | {"expression": "neutral", "share": 0.8} | changes


def jpeg() -> bytes:
    import cv2
    import numpy as np

    return bytes(cv2.imencode(".jpg", np.full((144, 176, 3), 128, np.uint8))[1].tobytes())


def test_random_weights_cannot_be_missed(browser: Browser, told: tuple[Hub, str]) -> None:
    hub, url = told
    hub.tell({"about": about(trained=False)})
    with opened(browser, url, "phone") as page:
        expect(page.locator("#untrained")).to_be_visible()
        expect(page.locator("#untrained")).to_contain_text("RANDOM WEIGHTS")
        expect(page.locator("#untrained")).to_be_in_viewport()


def test_held_results_drowsiness_and_a_lost_camera(browser: Browser, told: tuple[Hub, str]) -> None:
    hub, url = told
    counts: dict[str, Any] = {"frames": 9, "frames_dropped": 4, "faces": 1, "duration_s": 61.0, "held_share": 0.25}
    counts |= {"expression_s": {"neutral": 40.0}, "perclos": {"most": 0.31}}
    status = {"state": "playing", "words": "", "fps": 30.0, "latency": {"total": [3.0, 9.0]}, "session": counts}
    shares = [["neutral", 0.8], ["fear", 0.2]]
    now = {"t": 60.0, "picture": True, "faces": [face()], "shares": shares, "observed_s": 60.0}
    sample = [60.0, 0.1, -0.2, 0.9, 0.31, "neutral", False, 0]
    hub.tell({"about": about(), "status": status, "now": now, "samples": [sample]})
    with opened(browser, url, reduced_motion="reduce") as page:
        expect(page.locator("#perclos")).to_have_text("31 %")
        expect(page.locator("#held")).to_be_hidden()
        hub.show({"t": 60.0, "width": 176, "height": 144, "faces": [face()]}, jpeg())
        grown(page, 0)
        blue = pixels(page)

        held = now | {"t": 60.1, "faces": [face(held=True, drowsy=True)], "picture": False}
        drowsy = {"event": "drowsiness", "timestamp_s": 60.1, "track_id": 0, "held": False, "signal": True}
        stalled = {"event": "source", "timestamp_s": 60.1, "track_id": None, "kind": "stalled", "detail": "cable <b>"}
        events = [drowsy | {"perclos": 0.31}, stalled]
        hub.tell({"now": held, "samples": [[60.1, *sample[1:6], True, 0]], "events": events})
        expect(page.locator("#held")).to_be_visible()
        expect(page.locator("body")).to_have_class("is-held")
        expect(page.locator("#signal")).to_have_text("on")
        expect(page.get_by_role("alert")).to_contain_text("Drowsiness signal, face 0: eyes shut for 31 %")
        expect(page.get_by_role("alert")).to_contain_text("no diagnosis")
        expect(page.locator("#events li").first).to_contain_text("source stalled: cable <b>")  # text, not markup
        page.wait_for_function("before => document.getElementById('picture').toDataURL() !== before", arg=blue)
        expect(page.locator("#dropped")).to_have_text("4")
        assert page.evaluate("getComputedStyle(document.querySelector('.meter > span')).transitionDuration") == "0s"

        hub.tell({"status": status | {"state": "failed", "words": "camera 0: no picture for 30 s"}})
        expect(page.locator("#state")).to_have_text("Failed")
        expect(page.locator("#words")).to_have_text("camera 0: no picture for 30 s")
        expect(page.locator("#facts")).to_contain_text("25.0 %")
        hub.tell({"events": [drowsy | {"signal": False, "perclos": 0.05}]})
        expect(page.get_by_role("alert")).to_be_empty()

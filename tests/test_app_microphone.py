"""The page's live mode when its microphone gives no sound: it says so, and when sound comes again. In Chromium, as `test_app_page`."""

import pytest


pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("gradio", reason="needs the extra app")
pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
from test_app_live import save_noise_detector
from test_app_page import CHROMIUM, TEMPORARY, Served, driver, microphone  # noqa: F401 (fixtures)

from transformers_sslam.app.sessions import Sessions


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def test_a_microphone_without_sound_is_told_and_when_sound_comes_again(microphone, tmp_path, monkeypatch):  # noqa: F811
    """It plays noise for 1 s in every 6; then its blocks stop, as of one that is unplugged."""
    monkeypatch.setenv(TEMPORARY, "")
    with Sessions(3600) as sessions:
        server = Served(save_noise_detector(tmp_path / "model"), sessions, live_window=0.64, live_hop=0.16)
        page = microphone(server.address)
        page.evaluate(
            "() => { const get = AudioContext.prototype.createMediaStreamSource; AudioContext.prototype.createMediaStreamSource ="
            " function (...given) { window.context = this; return get.apply(this, given); }; }"
        )
        page.get_by_role("button", name="Start listening").click()
        for _ in range(2):
            page.wait_for_selector(".sslam-live-state:has-text('The microphone sends silence only: it may be muted')")
            page.wait_for_selector(".sslam-live-state:has-text('Sound arrives again. Listening.')")
        assert page.locator(".sslam-live-events tbody tr").count() >= 1
        page.evaluate("() => window.context.suspend()")
        page.wait_for_selector(".sslam-live-state:has-text('The microphone sends nothing: check that it is connected')")
        page.evaluate("() => window.context.resume()")
        page.wait_for_selector(".sslam-live-state:has-text('Sound arrives again. Listening.')")
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_selector(".sslam-live-state:has-text('Stopped.')")
        page.wait_for_timeout(4000)
        assert page.inner_text(".sslam-live-state") == "Stopped."  # nothing is watched any more
        server.page.blocks.close(verbose=False)

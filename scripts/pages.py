"""Photograph the server's pages for the documentation: python scripts/pages.py

Draws scenes, has a detector of our own score them, starts a server over that, and takes docs/images/server-*.png with
Chromium. Needs the extra ``server``, onnx and playwright.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "live_dashboard"
IMAGES = ROOT / "docs" / "images"
TALLY = [sys.executable, "-m", "tally"]


def main() -> None:
    with TemporaryDirectory() as folder:
        env = {**os.environ, "TALLY_HOME": f"{folder}/home"}

        def run(*command: str) -> str:
            return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout

        run(sys.executable, str(EXAMPLE / "make_scenes.py"), "scenes", "--count", "400")
        run(sys.executable, str(EXAMPLE / "make_detector.py"), "detector")
        run(*TALLY, "simulate", "pictures", "--out", "shapes", "--count", "1000")
        run(*TALLY, "score", "shapes", "--model", "tally:shapes", "--out", "named")
        run(*TALLY, "score", "scenes", "--model", "detector", "--out", "boxes", "--price-per-hour", "0.12")
        key = run(*TALLY, "keys", "add", "photographer", "--role", "admin").strip().splitlines()[-1]
        server = subprocess.Popen(
            [*TALLY, "up", "--port", "0", "--root", "."], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if line.startswith("Tally is at ")).split()[-1]
            photograph(address, key)
        finally:
            server.terminate()
            server.wait()


def photograph(address: str, key: str) -> None:
    with sync_playwright() as playwright:
        program = os.environ.get("TALLY_TEST_CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 760})
        page.goto(address)
        page.fill("input[name=key]", key)
        page.press("input[name=key]", "Enter")
        page.wait_for_url(f"{address}/")
        page.wait_for_timeout(5000)  # figures come as events
        page.screenshot(path=IMAGES / "server-jobs.png")
        page.locator("tbody a").first.click()
        page.wait_for_selector("h2:has-text('Pictures')")
        page.wait_for_timeout(5000)
        page.locator("h2", has_text="Labels").evaluate("heading => heading.scrollIntoView()")
        page.wait_for_timeout(5000)  # pictures come once they are in sight
        page.screenshot(path=IMAGES / "server-pictures.png")
        browser.close()


if __name__ == "__main__":
    main()

"""Take the guide's picture of the playground, with the demo's adapter, in Chromium.

reftnoise demo
python examples/serving/playground_picture.py reftnoise-demo examples/serving/playground.png
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from reftnoise.inference.loading import load_library
from reftnoise.inference.playground.local import LocalModel
from reftnoise.inference.playground.page import build, launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompt", default="Where does a bear live?")
    parser.add_argument("--port", type=int, default=7861)
    options = parser.parse_args()
    reft_model, tokenizer = load_library({"demo": options.adapter}, "tiny-chat")
    page = build(LocalModel(reft_model, tokenizer, "tiny-chat"), template="chat")
    address = launch(page, host="127.0.0.1", port=options.port, waits=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        view = browser.new_page(viewport={"width": 1000, "height": 800})
        view.goto(address)
        view.fill("#prompt textarea", options.prompt)
        view.click("#ask")
        view.wait_for_selector("#norms-1 td.new")
        view.wait_for_timeout(3000)
        view.screenshot(path=options.output, full_page=True)
        browser.close()
    page.close()


if __name__ == "__main__":
    main()

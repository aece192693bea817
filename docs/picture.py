"""Take the README's picture: the top of the demo's report in a headless Chromium. `make picture` runs it.

In: a report's HTML file. Out: a PNG of at most 256 colours. Needs chromium, chromedriver and selenium.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, HEIGHT = 1400, 1540
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"


def take(page: Path, width: int, height: int) -> bytes:
    """Return a screenshot of the top of a page, as PNG, in the light theme."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(page.resolve().as_uri())
            return browser.get_screenshot_as_png()
        finally:
            browser.quit()


def main() -> None:
    """Read the report named first and write the picture named second."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    picture = Image.open(io.BytesIO(take(source, WIDTH, HEIGHT))).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(target, optimize=True)
    sys.stdout.write(f"{target}: {target.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()

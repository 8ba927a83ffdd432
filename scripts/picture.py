"""Picture of a report's page, by headless Chromium: `python scripts/picture.py report.html docs/figures/report.png`."""

import argparse
import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(1200, 1750), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        parser.error("chromium and chromedriver are needed")
    settings = webdriver.ChromeOptions()
    settings.binary_location = browser
    for flag in (
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--window-size={options.size[0]},{options.size[1]}",
    ):
        settings.add_argument(flag)
    if options.dark:
        settings.add_argument("--blink-settings=preferredColorScheme=0")
    chromium = webdriver.Chrome(options=settings, service=Service(driver))
    try:
        chromium.get(options.page.resolve().as_uri())
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        chromium.save_screenshot(str(options.picture))
    finally:
        chromium.quit()
    print(f"written: {options.picture}")


if __name__ == "__main__":
    main()

"""The page in a real browser: it draws, it answers the keyboard, and it complains of nothing. Skips where no browser is installed."""

import re
import shutil
import subprocess

import pytest

from moeforge.report.html.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=4000"]  # fmt: skip
PROBE = """
<script>
  const told = [];
  window.addEventListener("error", (event) => told.push(event.message));
  window.addEventListener("load", () => {
    const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    for (const canvas of document.querySelectorAll("canvas")) {
      canvas.focus();
      for (const key of ["ArrowDown", "ArrowRight", "End", "PageDown", "Home", "ArrowUp"]) press(canvas, key);
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      told.push(`drawn ${new Set(pixels).size > 8}: ${canvas.closest("figure").querySelector("output").textContent}`);
    }
    for (const select of document.querySelectorAll("select")) {
      select.selectedIndex = select.options.length - 1;
      select.dispatchEvent(new Event("change"));
    }
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    const text = document.querySelector(".text");
    if (text) for (const key of ["ArrowRight", "ArrowUp", "ArrowDown", "End"]) press(text, key);
    setTimeout(() => document.body.setAttribute("data-told", told.join("\\n")), 500);
  });
</script>
"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)}); Debian: apt-get install chromium")
    return found


@pytest.fixture
def visit(browser, tmp_path):
    """(DOM after the page has run, what it said on the console, what the probe saw)."""

    def see(html, dark=False, width=1280):
        file = tmp_path / "page.html"
        # the probe is a stranger to the page's policy, which is tested on the page as it is
        file.write_text(html)
        style = ["--force-dark-mode"] if dark else []
        done = subprocess.run([browser, *QUIET, *style, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000", "--dump-dom",
                               file.as_uri()], capture_output=True, text=True, timeout=120)  # fmt: skip
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert done.returncode == 0 and "</html>" in done.stdout, done.stderr[-2000:]
        return done.stdout, console, (re.findall(r'data-told="([^"]*)"', done.stdout) or [None])[0]

    return see


def probed(html):
    """The page with the probe in it, and without its policy."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    return html.replace("<body>", "<body>" + PROBE, 1)


@pytest.fixture(scope="module")
def numbers(home, report):
    """Of the tuned mixture with a text that looks like a script."""
    text = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">\n'
    return report(home / "tuned", text=text).data


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 400)])
def test_everything_is_drawn_and_answers_the_keyboard(visit, numbers, dark, width):
    _, console, told = visit(probed(page(numbers)), dark, width)
    assert console == []
    lines = told.splitlines()
    assert [line for line in lines if not line.startswith("drawn true: ")] == [], (
        "errors of the script, or canvases that stayed empty"
    )
    assert len(lines) == 4  # load, lift, drift, experts apart
    for line in lines:
        # down, right, end, last row, home, up: the last row but one, the first column
        assert re.search(r"layer 1, expert 0: [\d.e-]+", line), line


def test_the_page_as_it_is_runs_its_script_and_no_other(visit, numbers):
    dom, console, _ = visit(page(numbers))
    assert console == []
    assert "<title>tuned · moeforge report</title>" in dom and "<img" not in dom
    assert (
        dom.count('id="token-') == len(numbers["tokens"]["tokens"])
        and "experts and their weights, layer by layer" in dom
    )
    # an inline script that is not the page's own is refused by its policy
    dom, console, _ = visit(page(numbers).replace("<body>", '<body><script>document.title = "taken"</script>', 1))
    assert "<title>tuned · moeforge report</title>" in dom and any(
        "Content Security Policy" in line for line in console
    )


def test_an_error_of_the_script_would_be_seen(visit, numbers):
    broken = page(numbers).replace('"maps":', '"charts":', 1)
    _, console, told = visit(probed(broken))
    assert any("Uncaught" in line for line in console) and "TypeError" in told

"""The page is whole, fetches nothing, runs nothing but its own script, and says of every section what it has or how to get it."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess

import pytest

from moeforge.report.html import markup
from moeforge.report.html.heat import site_labels
from moeforge.report.html.lineage import lineage_section
from moeforge.report.html.lines import loss_chart
from moeforge.report.html.page import SECTIONS, page
from moeforge.report.html.training import loss_section

KINDS = ("dense", "moe", "own", "tuned", "small", "attached", "adapter")
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!--",
    "&lt;b&gt;",
    "\u2028</style>",
]


def policy(found):
    return next(
        about["content"] for about, _ in found.named("meta") if about.get("http-equiv") == "Content-Security-Policy"
    )


def check(found):
    """What every page must be."""
    ids = [about["id"] for _, about in found.found if about.get("id")]
    assert len(set(ids)) == len(ids)
    for name, about in found.found:
        assert not any(key.startswith("on") for key in about), f"{name} {about}"
        assert name not in ("link", "img", "iframe", "object", "embed", "form", "base")
        assert about.get("src") is None
        assert about.get("href", "#").startswith("#") and about["href"][1:] in ids if "href" in about else True
    running = [text for about, text in found.named("script") if about.get("type") is None]
    assert len(running) == 1 and len(found.named("style")) == 1
    digest = base64.b64encode(hashlib.sha256(running[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy(found) and "default-src 'none'" in policy(found)
    for about, text in found.named("script"):
        if about.get("type") is not None:
            assert about["type"] == "application/json" and json.loads(text) is not None
    drawn = {about["data-from"] for about, _ in found.named("figure") if "data-from" in about}
    assert drawn == {about["id"] for about, _ in found.named("script") if "id" in about}
    return running[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_every_kind_is_whole_and_keeps_to_itself(home, report, elements, kind):
    answer = report(home / kind)
    found = elements(answer.page)
    script = check(found)
    assert not re.search(r"(?i)https?://|url\(|@import", answer.page.replace("http-equiv", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(|XMLHttp", script)
    titles = [text for _, text in found.named("h2")]
    assert titles == [title for title, _ in SECTIONS.values()]
    absent = [text for about, text in found.named("p") if about.get("class") == "missing"]
    assert len(absent) == len(answer.data["missing"])
    assert {name for name, about in answer.data["missing"].items() if "command" in about} <= set(SECTIONS)


def test_the_script_parses(home, report, elements, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, and nothing else here parses JavaScript")
    script = tmp_path / "page.js"
    script.write_text(check(elements(report(home / "moe", drift=False).page)))
    done = subprocess.run([node, "--check", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FREE = {"options", "method_options", "chosen", "counts", "verdicts", "versions", "roles", "outside", "parameters_by_role", "bytes_by_role",
        "bytes_by_dtype"}  # fmt: skip
"""Tables whose keys come from files, too."""


def hostile(numbers, text, within=None):
    """The numbers with every string that comes from a file made hostile."""
    if isinstance(numbers, dict):
        return {(text + key if within in FREE else key): hostile(value, text, key) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [hostile(value, text) for value in numbers]
    return text + numbers if isinstance(numbers, str) else numbers


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_files_is_text_and_nothing_else(home, report, elements, text):
    numbers = report(home / "tuned", text="0 bottles").data
    assert {name for name, held in numbers.items() if held} >= {
        "lineage",
        "sizes",
        "training",
        "specialisation",
        "tokens",
        "drift",
        "apart",
    }
    clean, numbers = elements(page(numbers)), hostile(numbers, text)
    found = elements(page(numbers))
    check(found)
    assert [name for name, _ in found.found] == [name for name, _ in clean.found]
    assert [about.keys() for _, about in found.found] == [about.keys() for _, about in clean.found]
    told = next(text for about, text in found.named("script") if about.get("id") == "tokens-data")
    assert json.loads(told)["tokens"] == numbers["tokens"]["tokens"]
    assert any(text in value for value in found.texts.values())


def test_markup_escapes_whatever_is_not_markup():
    made = markup.tag("p", "<b>", markup.tag("i", "&"), title='"<', data_x="1", class_=None)
    assert made == '<p title="&quot;&lt;" data-x="1">&lt;b&gt;<i>&amp;</i></p>'
    assert (
        "<"
        not in markup.data("x", ["</script>", "<!--"])[
            len('<script type="application/json" id="x">') : -len("</script>")
        ]
    )


def big_numbers(layers=48, experts=128, active=8, tokens=256):
    """What a model of the size of Qwen3-30B-A3B gives."""
    draw = random.Random(0)
    sites = [f"model.layers.{layer}.mlp" for layer in range(layers)]

    def table():
        return [[draw.random() / experts for _ in range(experts)] for _ in sites]

    def load(step):
        return {"title": f"held-out text, step {step}", "load": table(), "sites": sites, "entropy": [4.1] * layers}

    routes = [
        [[v for e in draw.sample(range(experts), active) for v in (e, draw.random())] for _ in range(tokens)]
        for _ in sites
    ]
    roles = {role: [draw.random() for _ in sites] for role in ("attention", "experts", "routers", "norms and biases")}
    names = [f"label {label}" for label in range(6)]
    return {
        "ref": "/models/big", "kind": "checkpoint", "digest": None, "moeforge": "0", "lineage": None, "files": {}, "eval": None, "sizes": None,
        "missing": {name: {"why": "not here"} for name in ("lineage", "sizes", "eval")},
        "training": {"from": "/models/big", "steps": [[s, draw.random()] for s in range(50_000)], "held_out": [[s, 2.0] for s in range(900)],
                     "loads": [load(step) for step in range(40)]},
        "specialisation": {"title": "held-out text", "labels": names, "sites": sites, "lift": [table() for _ in names],
                           "separation": [[0.5 for _ in names] for _ in sites]},
        "tokens": {"tokens": ["word "] * tokens, "ids": [1] * tokens, "of": 9999, "sites": sites, "counts": [experts] * layers,
                   "routes": routes, "load": table()},
        "drift": {"parent": "/models/dense", "same": True, "layers": list(range(layers)), "roles": roles, "experts": table(), "outside": {},
                  "compared": 18000, "without": [f"{site}.gate.weight" for site in sites]},
        "apart": {"layers": list(range(layers)), "mean": table(), "pairs": None, "nearest": [(0.1, 5, 3)] * layers},
    }  # fmt: skip


def test_a_page_of_48_layers_of_128_experts_stays_small(elements):
    made = page(big_numbers())
    assert len(made.encode()) < 2_000_000
    found = elements(made)
    check(found)
    assert len(found.found) < 8_000
    assert "of 41 measurements are shown" in made and "The first 256 of 9999 tokens." in made


def test_rows_without_values_and_of_different_lengths_are_drawn(elements):
    numbers = big_numbers(2, 3, 1, 4)
    numbers["drift"]["experts"] = [[None, 0.5, None], []]
    numbers["drift"]["roles"] = {"attention": [None, None]}
    numbers["apart"] |= {"mean": [[None, None, None], [0.1, 0.2, 0.3]], "nearest": [None, (0.1, 1, 0)]}
    numbers["training"]["loads"][-1]["load"] = [[0.0, 0.0, 0.0], [1.0]]
    numbers["training"] |= {"steps": [[1, 2.0]], "held_out": []}
    check(elements(page(numbers)))


def test_curves_lie_where_their_axes_say():
    steps = [[step, 4.0 - step / 50] for step in range(1, 101)]
    told = str(loss_section({"from": "here", "steps": steps, "held_out": [], "distances": [[1, 0.75], [100, 0.125]]}))
    assert "0.75 nats a token in step 1, 0.125 in step 100" in told
    assert "teacher" not in str(loss_section({"from": "here", "steps": steps, "held_out": []}))
    chart = loss_chart(steps, [[0, 4.0], [100, 2.0]])
    labels = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', chart)]
    heights = [float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', chart)]
    points = re.findall(r'<circle class="held-point" cx="([\d.]+)" cy="([\d.]+)"', chart)
    per_nat = (heights[0] - heights[-1]) / (labels[-1] - labels[0])
    assert labels[0] <= 2.0 and labels[-1] >= 4.0
    for (_, y), loss in zip(points, (4.0, 2.0), strict=True):
        assert float(y) == pytest.approx(heights[0] - (loss - labels[0]) * per_nat, abs=0.2)
    assert float(points[1][0]) > float(points[0][0]) + 300
    mean = [
        tuple(map(float, pair.split(",")))
        for pair in re.search(r'class="mean-loss" points="([^"]+)"', chart)[1].split()
    ]
    # the mean of the last five of a falling line lies two steps back on it
    assert mean[-1][1] == pytest.approx(heights[0] - (4.0 - 98 / 50 - labels[0]) * per_nat, abs=0.2)


def test_rows_are_named_by_layer_and_by_what_a_layer_has_several_of():
    assert site_labels(["model.layers.1.mlp", "model.layers.7.mlp"]) == ["1", "7"]
    assert site_labels(["layers.1.self_attn.q_proj", "layers.1.mlp", "head"]) == ["1 self_attn.q_proj", "1 mlp", "head"]


def test_a_lineage_tells_a_teacher_from_a_source():
    step = {"verb": "tune", "parents": [{"ref": "/models/moe"}, {"ref": "/models/dense", "role": "teacher"}]}
    told = str(lineage_section({"lineage": step}))
    assert "source: moe" in told and "teacher: dense" in told

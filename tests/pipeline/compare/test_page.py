"""The HTML report: all of it is there, it loads nothing, and names in the data stay text."""

import dataclasses
import io
import re
from html.parser import HTMLParser

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sere.conf.schema import EngineConfig, GenerateConfig, RerouteConfig, TrackingConfig
from sere.pipeline.compare import charts
from sere.pipeline.compare.report import compare
from sere.pipeline.tracking.tracker import track

NASTY = "<script>alert('1')</script>\"&[bold]"
NUM_ROWS = 200


@pytest.fixture(scope="module")
def store(tmp_path_factory, demo_artifact):
    """Runs with everything that can be shown, and names that must not be taken for markup."""
    folder = tmp_path_factory.mktemp("store")
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/ml.db", experiment=f"e {NASTY}")
    sere = RerouteConfig(similarity=str(demo_artifact), primary_top_k=1)
    for number, reroute in enumerate(
        (
            RerouteConfig(policy="none"),
            sere,
            dataclasses.replace(sere, threshold=0.3),
            RerouteConfig(policy="random"),
            # Its file is not there.
            dataclasses.replace(sere, similarity=f"{folder}/{NASTY}"),
        )
    ):
        config = GenerateConfig(
            model=NASTY, data="https://data.example/x.parquet", output="o", reroute=reroute, tracking=tracking
        )
        with track(tracking, kind="generate", default_name=NASTY) as tracker:
            tracker.log_config(config)
            for layer in range(4):
                tracker.log_metrics(
                    {"layer/active_experts_before": 40, "layer/active_experts_after": 40 - 5 * number}, step=layer
                )
            for second in (5, 10, 15):
                tracker.log_metrics({"progress/tokens_per_s": 1000.0 + second}, step=second)
            quality = 0.9 - 0.05 * number
            tracker.log_metrics(
                {
                    "exact_match": quality,
                    "exact_match/add": quality,
                    "active_experts_before": 40,
                    "active_experts_after": 40 - 5 * number,
                    "tokens_per_s": 1000 + 100 * number,
                    "num_rows": NUM_ROWS,
                }
            )
            hits = [row < quality * NUM_ROWS for row in range(NUM_ROWS)]
            table = pa.table(
                {"source_file": ["f"] * NUM_ROWS, "source_row": range(NUM_ROWS), "task": ["add"] * NUM_ROWS, "hit": hits}
            )
            pq.write_table(table, folder / "scores.parquet")
            tracker.log_file(folder / "scores.parquet")
    yield tracking
    mlflow.set_tracking_uri(None)


def page_of(store, folder, **settings):
    console = Console(width=160, file=io.StringIO(), record=True)
    compare(store.experiment, uri=store.uri, output=str(folder), console=console, **settings)
    return (folder / "report.html").read_text(encoding="utf-8"), console.export_text()


@pytest.fixture(scope="module")
def page(store, tmp_path_factory):
    return page_of(store, tmp_path_factory.mktemp("out"), max_loss=0.12)


class Elements(HTMLParser):
    """Elements with their attributes, the text outside of styles, and whether all that opens closes."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text, self.styles = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.text).append(data)


def assert_loads_nothing(page):
    elements = Elements(page)
    assert not {tag for tag, _ in elements.found} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "video",
        "audio",
        "image",
    }
    for _, attributes in elements.found:
        for name, value in attributes.items():
            assert not name.startswith("on"), "an event handler"
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
                assert value.startswith(("data:image/png;base64,", "#"))
            if name == "style":
                assert re.fullmatch(r"--strength:[\d.]+", value)
    for style in elements.styles:
        assert "@import" not in style and "http" not in style
        assert all(target.strip("'\"").startswith("data:") for target in re.findall(r"url\(([^)]*)\)", style))
    policies = [a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_loads_nothing(page):
    assert_loads_nothing(page[0])


@pytest.mark.parametrize("bad", ['<img src="https://x/y.png">', "<script src=x></script>", "<style>@import 'x'</style>"])
def test_the_check_finds_what_loads(page, bad):
    with pytest.raises(AssertionError):
        assert_loads_nothing(page[0].replace("</main>", f"{bad}</main>"))


def test_names_are_text(page):
    elements, text = Elements(page[0]), page[1]
    assert f"e {NASTY}" in "".join(elements.text) and "alert" not in "".join(elements.styles)
    assert "<script" not in page[0]
    assert NASTY in text, "square brackets are no markup on the terminal either"


def test_everything_is_shown(page):
    html, text = page
    shown = " ".join(" ".join(Elements(html).text).split())
    for heading in (
        "Configurations",
        "Quality and active experts",
        "Quality and speed",
        "Exact match by task",
        "Active experts by MoE layer",
        "Tokens/s over time",
        "Similarity of experts",
        "Settings that differ",
    ):
        assert heading in shown
    assert html.count("data:image/png;base64,") == 4, "a heatmap for each layer"
    assert html.count('class="chart"') == 2 + 5 + 5, "two fronts, layers of 5 runs, time of 5 runs"
    assert "reroute.threshold" in shown and "tracking.experiment" not in shown and "Rows 200" in shown
    sentence = next(line for line in text.splitlines() if line.startswith("Recommended: "))
    assert " ".join(sentence.split()) in shown and "likely: only the point estimate is within" in sentence
    assert "rho=0.3" in sentence and "+0.060 to +0.145" in shown
    assert html.count("Pareto: experts") == 5


def test_similarity_that_cannot_be_read_is_a_note(store, tmp_path):
    html, text = page_of(store, tmp_path, max_loss=0.25)
    shown = "".join(Elements(html).text)
    assert "no similarity heatmaps" in shown and "data:image/png" not in html, "the recommended run's file is missing"
    assert "Note: no similarity heatmaps" in text


def test_least_that_can_be_shown(tmp_path):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/ml.db", experiment="e")
    for size in (4, 16):
        config = GenerateConfig(model="m", data="d", output="o", engine=EngineConfig(max_num_seqs=size), tracking=tracking)
        with track(tracking, kind="generate", default_name="n") as tracker:
            tracker.log_config(config)
    html, _ = page_of(tracking, tmp_path / "out")
    assert_loads_nothing(html)
    shown = "".join(Elements(html).text)
    assert "max_num_seqs 4" in shown and "max_num_seqs 16" in shown and "No recommendation" in shown
    assert '<svg class="chart"' not in html


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.61, 0.67), (-3, 1e6), (0, 0), (1e-9, 2e-9)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 8 and found == sorted(found)
    assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in found)


def test_numbers_of_points_do_not_cover_each_other():
    points = [charts.Point(1, 0.5, n, "x", "sere", False, False) for n in range(1, 7)]
    svg = charts.scatter(points, x_label="x", y_label="y")
    places = re.findall(r'<text class="number" x="([\d.]+)" y="([\d.]+)"', svg)
    assert len(set(places)) == 6

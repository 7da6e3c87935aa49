"""If these fail, the report is not one self-contained page, or breaks on what it is given."""

from html.parser import HTMLParser

import numpy as np

from iar_jax.metrics import report


class Checker(HTMLParser):
    """Collects what a browser would fetch, and whether tags close."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_fetches_nothing():
    metrics = [{"step": i, "train/loss": 1.0 / i, "val/loss": 2.0 / i} for i in range(1, 5)]
    figures = [
        report.picture(np.zeros((4, 4, 3), np.uint8), "a <picture>"),
        report.curves(metrics, ("loss", "unknown"), "losses", "falling"),
        report.usage_histogram(np.array([3.0, 0.0, 1.0]), "usage"),
        report.codebook_map(np.random.default_rng(0).standard_normal((8, 3)), np.arange(8) // 2, "clusters"),
    ]
    section = report.Section(
        "A & B", "text", [report.Table(("x", "y"), [("1", "<2>")])], figures, preformatted='{"a": "<b>"}'
    )
    page = report.page("Title <1>", "subtitle", [("97 %", "of it")], [section])
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert len(checker.fetched) == 4
    assert all(source.startswith("data:image/png;base64,") for source in checker.fetched)
    for text in ("Title <1>", "A & B", "<2>", '{"a": "<b>"}', "97 %"):
        assert text in checker.text


def test_curves_without_data_are_left_out():
    assert report.curves([{"step": 1, "train/loss": 1.0}], ("psnr",), "PSNR", "dB") is None

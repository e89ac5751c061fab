"""The gates as a page and as figures: what they show is what the report says."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from xml.etree import ElementTree

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import se_inject
from se_inject.rescale.gate_report import GateReport
from se_inject.tools.channel_maps import strongest_channels
from se_inject.tools.gate_plots import CHANNELS, channels_of, early_middle_last, lines, panel

from ..cli.test_cli import call
from ..rescale.test_fold import lived_in
from ..support.browsers import needs_browser, seen
from ..support.checks import randomise

pytestmark = [  # timm's dataset leaves its files to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
ODD = "_<b>&$x$"
NAMES = ("cat", "dog", "eel", "fox", "gnu", ODD)
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of six classes, three of each."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        (root / name).mkdir()
        for i in range(3):
            pixels = torch.randint(256, (80, 90, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    torch.manual_seed(0)
    se_inject.save(lived_in(se_inject.inject(randomise(timm.create_model("test_resnet")))), path)
    return path


@pytest.fixture(scope="module")
def report(file, folder):
    """What `gates` says of all pictures."""
    model = se_inject.load(file)
    transform = create_transform(**resolve_model_data_config(model, {"input_size": (3, SIZE, SIZE)}), is_training=False)
    names = sorted(NAMES)
    batches = [
        (torch.stack([transform(Image.open(p)) for p in sorted((folder / name).iterdir())]), torch.full((3,), i))
        for i, name in enumerate(names)]
    return se_inject.gates(model, batches, class_names=names)


@pytest.fixture(scope="module")
def page(file, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "gates.html"
    call("gates", file, folder, "--img-size", SIZE, "-o", out, "--max-variation", 0.001)
    return out


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each line of a panel, in the order in which they were drawn."""
    found = re.findall(r'<g id="[^"]*line2d_\d+">\s*<path d="([^"]+)"[^>]*clip-path', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)] for d in found]


def test_the_command_prints_what_gates_says(file, folder, report):
    out, _ = call("gates", file, folder, "--img-size", SIZE, "--batch", 4, "--json")
    said = json.loads(out)
    assert said["classes"] == sorted(NAMES) and said["class_images"] == [3] * 6
    for d, s in zip(said["sites"], report.sites, strict=True):
        assert d["path"] == s.path and torch.allclose(torch.tensor(d["mean"]).double(), s.mean, rtol=1e-5)
        assert torch.allclose(torch.tensor(d["class_means"]).double(), s.class_means, rtol=1e-5)
    assert call("gates", file, folder, "--img-size", SIZE)[0] == f"{report}\n"
    some = json.loads(call("gates", file, folder, "--img-size", SIZE, "--limit", 4, "--json")[0])
    assert some["images"] == 4 and some["class_images"] == [1] * 4


def test_a_folder_without_classes(file, folder, tmp_path):
    out = tmp_path / "flat.html"
    table = call("gates", file, folder / "cat", "--img-size", SIZE, "-o", out)[0]
    assert table.endswith("the gates of 4 blocks on 3 images\n")
    text = out.read_text()
    assert "4 blocks of <code>se_inject/test_resnet</code> on 3 images, from <code>cat/</code>" in text
    assert "treats the images differently" in text and "A picture, as the model gets it" in text


def test_the_page_needs_no_other_file(page):
    text = page.read_text()
    assert not re.search(r"<(script|link|iframe|object)|@import|url\((?!#)", text)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in re.findall(r'(?:src|href)="([^"]*)"', text))
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(ids)) == len(ids) > 10


def test_the_page_says_what_the_report_says(page, report):
    text = page.read_text()
    rows = re.findall(r"<tr><td.*?</tr>", text)
    for row, s in zip(rows, report.sites, strict=True):
        cells = [unescape(re.sub(r"<.*?>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        assert cells == [
            s.path, str(len(s.mean)), f"{float(s.mean.mean()):.4f}", f"{100 * s.variation:.2f} %", "",
            "constant" if s.folds(0.001) else "block"]
    assert 0 < sum(s.folds(0.001) for s in report.sites) < 4, "the model does not tell the two marks apart"
    assert text.count("<b>&") == 0 and "_&lt;b&gt;&amp;$x$" in text and "4 of 6 classes are drawn" in text


def test_lines_have_the_values_of_the_report(report):
    """The points of an SVG are an affine function of the values: all of one function."""
    drawn = lines(report.classes, ("dog", "gnu"))
    pairs = []
    for site in early_middle_last(report):
        at = channels_of(site)
        expected = [*(site.class_means[report.classes.index(name)][at] for name in ("dog", "gnu")), site.mean[at]]
        found = points(panel(report, site, drawn))[-3:]
        for line, values in zip(found, expected, strict=True):
            pairs += [(y, float(v)) for (_, y), v in zip(line, values, strict=True)]
            x, channels = torch.tensor(line, dtype=torch.float64)[:, 0], torch.tensor(at, dtype=torch.float64)
            assert torch.allclose((x - x[0]) / (x[-1] - x[0]), channels / channels[-1], atol=1e-5)
    y, v = torch.tensor(pairs, dtype=torch.float64).T
    fit = torch.linalg.lstsq(torch.stack([v, torch.ones_like(v)], 1), y[:, None]).solution
    assert fit[0] < 0 and (fit[0] * v + fit[1] - y).abs().max() < 1e-3


def test_the_sites_and_channels_that_are_drawn(report):
    assert [s.stage for s in early_middle_last(report)] == [1, 3, 4]
    one_stage = GateReport(report.sites[:1] * 2 + report.sites[3:], {}, 18)
    assert len(early_middle_last(one_stage)) == 3 and len(early_middle_last(GateReport(report.sites[:2], {}, 18))) == 2
    wide = report.sites[3]
    assert len(wide.mean) > CHANNELS and channels_of(wide)[0] == 0 and channels_of(wide)[-1] == len(wide.mean) - 1
    assert len(set(channels_of(wide))) == CHANNELS and channels_of(report.sites[0]) == list(range(32))


def test_figures_for_papers(file, folder, report, tmp_path):
    arguments = ("gates", file, folder, "--img-size", SIZE, "--classes", ODD, "--classes", "eel")
    _, err = call(*arguments, "-o", tmp_path / "x.svg")
    assert f"written to {tmp_path / 'x.svg'}" in err
    tree = ElementTree.parse(tmp_path / "x.svg")
    texts = ["".join(t.itertext()) for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {ODD, "eel", "all images", "becomes a constant", *(s.path for s in report.sites)} <= set(texts)
    assert "cat" not in texts
    call(*arguments, "-o", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (2160, 1560) and image.convert("RGB").getcolors(1 << 24)[0][0] < 2160 * 1560
        colors = {c for _, c in image.convert("RGB").getcolors(1 << 24)}
    assert {(0, 114, 178), (230, 159, 0)} <= colors


def test_blocks_without_gates_are_on_the_page(folder, tmp_path):
    file, out = tmp_path / "m.safetensors", tmp_path / "x.html"
    se_inject.save(se_inject.inject(timm.create_model("test_resnet"), block="gca"), file)
    table, _ = call("gates", file, folder, "--img-size", SIZE, "-o", out)
    assert table.endswith("the gates of 0 blocks on 18 images of 6 classes\n")
    assert out.read_text().count("its output is not its input times a gate") == 4 and "<svg" not in out.read_text()
    assert "no gates to draw" in call("gates", file, folder, "--img-size", SIZE, "-o", tmp_path / "x.svg", code=1)[1]
    assert not (tmp_path / "x.svg").exists()


def test_a_model_that_was_not_trained(folder, tmp_path):
    """All gates are 1, and no variation is the limit of itself."""
    file = tmp_path / "m.safetensors"
    se_inject.save(se_inject.inject(timm.create_model("test_resnet")), file)
    for out in (tmp_path / "x.html", tmp_path / "x.svg"):
        call("gates", file, folder, "--img-size", SIZE, "--limit", 6, "--max-variation", 0, "-o", out)
    text = (tmp_path / "x.html").read_text()
    assert "takes 4 of 4 blocks out" in text and text.count('<circle cx="0.00%"') == 4
    assert "takes it" in call("gates", file, folder, "--img-size", SIZE, "--limit", 6)[0]


def test_the_strongest_channels(file):
    """Their gates and maps are those of the block's own call; a channel that is zero is not shown."""
    model, x, seen_by = se_inject.load(file), torch.randn(3, SIZE, SIZE), {}
    path = "layer3.0.se"
    block = model.get_submodule(path).eval()
    handle = block.register_forward_hook(lambda m, args, y: seen_by.update(x=args[0][0].clone(), y=y[0].clone()))
    last = model.get_submodule("layer3.0.bn3")
    with torch.no_grad():
        last.weight[:5], last.bias[:5] = 0, 0
        model.eval()(x[None])
    handle.remove()
    gates = seen_by["y"].double().sum((1, 2)) / seen_by["x"].double().sum((1, 2))
    order = [c for c in gates.nan_to_num(-1).argsort().tolist() if c >= 5]
    (found,) = strongest_channels(model, x, [path])
    assert [m.channel for m in found.lowered] == order[:3] and [m.channel for m in found.raised] == order[:-4:-1]
    for m in (*found.raised, *found.lowered):
        assert torch.equal(m.map, seen_by["x"][m.channel]) and m.gate == pytest.approx(float(gates[m.channel]), rel=1e-3)
    assert not block._forward_pre_hooks


@pytest.mark.parametrize("arguments, code, message", [
    (("-o", "x.pdf"), 2, r"'x.pdf': expected an OUT that ends in .html, .png or .svg"),
    (("-o", "nowhere/x.html"), 1, "there is no folder 'nowhere'"),
    (("--classes", "dog"), 2, "--classes says what is drawn: give -o OUT"),
    (("-o", "x.html", "--classes", "dgo"), 2, "no class 'dgo'.*did you mean 'dog'.*the classes are _"),
    (("-o", "x.html", *(a for name in (*NAMES, "hen") for a in ("--classes", name))), 2, "no class 'hen'"),
])  # fmt: skip
def test_refusals(file, folder, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, call("gates", file, folder, *arguments, code=code)[1].replace("\n", " "))
    assert not list(tmp_path.iterdir())


def test_refused_folders_and_files(file, folder, tmp_path):
    assert "there is no folder" in call("gates", file, tmp_path / "none", code=1)[1]
    assert "there are no pictures" in call("gates", file, tmp_path, code=1)[1]
    call("eject", file, "-o", tmp_path / "base.safetensors")
    assert "no injected blocks" in call("gates", tmp_path / "base.safetensors", folder, "--img-size", SIZE, code=1)[1]
    se_inject.save(se_inject.inject(timm.create_model("test_resnet", in_chans=1)), tmp_path / "gray.safetensors")
    assert "takes images of 1 channel" in call("gates", tmp_path / "gray.safetensors", folder, code=1)[1]
    with pytest.raises(se_inject.SEInjectError, match="7 are too many for one figure: choose at most 6"):
        lines([*NAMES, "hen"], [*NAMES, "hen"])


def test_without_matplotlib(file, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("gates", file, folder, "--img-size", SIZE)[0].startswith("site ")
    err = call("gates", file, folder, "-o", tmp_path / "x.html", code=1)[1]
    assert "pip install 'se-inject[plots]'" in err and not list(tmp_path.iterdir())


MEASURED = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
  const all = (query, f) => [...document.querySelectorAll(query)].map(f);
  return {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    rows: all('tbody tr', r => [...r.cells].filter(c => c.offsetParent).map(c => c.innerText.trim())),
    dots: all('tbody tr', r => { const s = box(r.querySelector('.strip svg')), c = box(r.querySelector('circle'));
                                 return ((c[0] + c[2]) / 2 - s[0]) / (s[2] - s[0]) }),
    filled: all('tbody circle', c => getComputedStyle(c).fill != 'rgb(255, 255, 255)'),
    panels: all('.panels > svg', box), legends: all('.legend', box), legend: all('#channels .legend li', e => e.innerText),
    axes: all('.panels > svg', s => box(s.querySelector('[id$="-patch_2"]'))),
    labels: all('.panels > svg', s => [...s.querySelectorAll('text')].map(
      t => [t.textContent, t.getBoundingClientRect().height])),
    outside: all('.panels > svg', s => [...s.querySelectorAll('text')].filter(
      t => box(t)[0] < box(s)[0] - 1 || box(t)[2] > box(s)[2] + 1).length),
    pictures: all('img', i => [i.complete && i.naturalWidth > 0, ...box(i), i.alt]),
    loaded: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
  }})()"""


@pytest.mark.contract
@needs_browser
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(page, report, tmp_path, width):
    found = seen(page, MEASURED, width, tmp_path)
    assert found["width"] == width and found["scroll"] <= width and found["loaded"] == []
    wide = width > 700
    for row, s in zip(found["rows"], report.sites, strict=True):
        shown = (str(len(s.mean)), f"{float(s.mean.mean()):.4f}") if wide else ()
        assert row[:-2] == [s.path, *shown, f"{100 * s.variation:.2f} %"]
    most = max(s.variation for s in report.sites)
    assert found["dots"] == pytest.approx([s.variation / most / 1.06 for s in report.sites], abs=0.01)
    assert found["filled"] == [s.folds(0.001) for s in report.sites]
    assert found["legend"] == [*sorted(NAMES)[:4], "all images", "± 1 standard deviation over all images"]
    lefts, tops, rights, bottoms = zip(*found["panels"])
    assert len(lefts) == 3 and max(rights) <= width and found["legends"][0][3] <= min(tops)
    if wide:
        assert len(set(tops)) == 1 and all(a <= b for a, b in zip(rights, lefts[1:]))
    else:
        assert len(set(lefts)) == 1 and all(a <= b for a, b in zip(bottoms, tops[1:]))
    edge = 1 if wide else 0  # panels side by side have one upper edge, and panels below one another one left edge
    assert max(a[edge] for a in found["axes"]) - min(a[edge] for a in found["axes"]) < 1
    assert found["outside"] == [0, 0, 0]
    for labels, s in zip(found["labels"], early_middle_last(report), strict=True):
        assert {f"{s.path} (stage {s.stage})", "mean gate (1 = unchanged)"} <= {text for text, _ in labels}
        assert all(height >= 11 for _, height in labels)
    assert len(found["pictures"]) == 1 + 3 * 6 and all(p[0] and p[1] >= 0 and p[3] <= width for p in found["pictures"])
    assert found["pictures"][0][-1] == f"A picture of the class {sorted(NAMES)[0]}"

"""What is compared is what it says, ratios are those of the same round, pages are made anew. How long it takes is not asked."""

import copy
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject import cli
from se_inject.config import SEConfig
from se_inject.surgery import pipeline
from se_inject.surgery.state import block_paths
from se_inject.tools import bench, timing
from se_inject.tools import bench_tables as bench_report
from se_inject.tools.timing import Job, Spread, interleaved, order, peak_memory, peak_resident, ratios
from se_inject.tools.variants import deviation, plain_variants

from ..cli.test_cli import call

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"
ONCE = ["--rounds", "1", "--threads", "1"]


def measured(*args):
    return json.loads(call("bench", *args, "--json")[0])


def by_name(comparison):
    return {e["name"]: e for e in comparison["entries"]}


class Clock:
    """A clock that only jobs move on; from the fifth call of a job on it takes twice as long."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def __call__(self):
        return self.seconds

    def job(self, name, seconds):
        def run(given):
            self.log.append(name)
            self.seconds += seconds * (1 if self.log.count(name) <= 4 else 2)

        return Job(run)


def test_ratios_come_from_the_same_round():
    clock = Clock()
    times = interleaved({"a": clock.job("a", 1.0), "b": clock.job("b", 3.0)}, rounds=6, now=clock)
    assert "".join(clock.log) == "aabb" + "abba" + "baab" + "abba"
    assert times == {"a": [1.0, 1.0, 2.0, 2.0, 2.0, 2.0], "b": [3.0, 3.0, 6.0, 6.0, 6.0, 6.0]}
    assert ratios(times, "b", "a") == Spread(3.0, 3.0, 3.0)
    assert Spread.of(times["a"]) == Spread(2.0, 1.25, 2.0)
    assert ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, "b", "a") == Spread(1.0, 0.75, 1.5)


def test_short_calls_fill_a_turn():
    clock = Clock()
    times = interleaved({"short": clock.job("short", timing.TURN / 2), "long": clock.job("long", 1.0)}, rounds=1, now=clock)
    assert clock.log.count("short") == 2 + 2
    assert clock.log.count("long") == 2 + 1
    assert times == {"short": [pytest.approx(timing.TURN / 2)], "long": [1.0]}


@pytest.mark.parametrize("min_time, rounds", [(0.0, timing.FEWEST), (8.0, 8)])
def test_the_rounds_fill_the_time(min_time, rounds):
    clock = Clock()
    times = interleaved({"a": clock.job("a", 0.5), "b": clock.job("b", 1.5)}, min_time=min_time, now=clock)
    assert len(times["a"]) == len(times["b"]) == rounds


def test_what_a_call_is_given_is_not_timed():
    clock = Clock()

    def setup():
        clock.seconds += 100
        return "given"

    def run(given):
        assert given == "given"
        clock.seconds += 0.01

    times = interleaved({"a": Job(run, setup)}, rounds=3, now=clock)
    assert times["a"] == pytest.approx([0.01] * 3)
    assert clock.seconds == pytest.approx(5 * 100.01)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_each_comes_first_as_often_as_any_other(count):
    names = list("abcdef"[:count])
    rounds = [order(names, i) for i in range(2 * count)]
    assert all(sorted(r) == names for r in rounds)
    assert sorted(r[0] for r in rounds) == sorted(names * 2)


def test_peak_memory_counts_what_is_alive_at_once():
    def run(_):
        a = torch.zeros(1000)
        b = torch.zeros(2000)
        del a
        c = torch.zeros(4000)
        return b, c

    assert 4 * 6000 <= peak_memory(Job(run), torch.device("cpu")) < 4 * 7000
    assert peak_memory(Job(run), torch.device("meta")) is None


def test_peak_resident_counts_what_is_written():
    grown = peak_resident(Job(lambda _: torch.ones(16_000_000).sum()))
    if grown is None:
        pytest.skip("the peak of a process is read where Linux says it, in /proc/self")
    assert grown >= 60_000_000


def test_the_variants_are_what_they_say():
    base, injected, native = plain_variants("resnet18", SEConfig(), {}, native=True)
    assert [v.name for v in (base, injected, native)] == ["base", "injected", "native"]
    assert native.architecture == "seresnet18"
    plan = se_inject.plan("resnet18")
    assert (base.blocks, injected.blocks, native.blocks) == (0, len(plan.sites), 0)
    assert injected.params == native.params == base.params + plan.added_params
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(injected.model(images), native.model(images))
        assert not torch.allclose(injected.model(images), base.model(images))
        for path in block_paths(injected.model):
            block = injected.model.get_submodule(path)
            x = torch.rand(1, block.channels, 2, 2)
            assert not torch.allclose(block(x), x)
        se_inject.eject(injected.model)
        assert torch.equal(injected.model(images), base.model(images))


def test_other_models_and_options():
    others = [("se_inject/test_resnet", {"se_stages": (3, 4), "se_block": "eca"}), ("test_vit", {"img_size": 64})]
    found = plain_variants("test_resnet", SEConfig(ratio=0.5), {"num_classes": 3}, others, native=False)
    assert [v.name for v in found[2:]] == ["se_inject/test_resnet se_stages=(3,4) se_block=eca", "test_vit img_size=64"]
    assert [v.blocks for v in found] == [
        0, len(se_inject.plan("test_resnet").sites), len(se_inject.plan("test_resnet", stages=(3, 4)).sites), 0]
    assert found[0].model.num_classes == 3


def test_inference():
    said = measured("resnet18", "--size", 32, "--batch", 1, "--batch", 2, "--channels-last", "--rounds", 2, "--threads", 1)
    assert said["measure"] == "inference"
    assert said["machine"]["threads"] == 1
    assert [c["batch"] for c in said["comparisons"]] == [1, 2]
    for comparison in said["comparisons"]:
        assert (comparison["model"], comparison["size"], comparison["rounds"]) == ("resnet18", [3, 32, 32], 2)
        found = by_name(comparison)
        plain = ["base", "injected", "native"]
        assert list(found) == [f"{name}{how}" for name in plain for how in ("", ", optimised")]
        for name, e in found.items():
            is_plain = name in plain
            assert set(e["ratios"]) == ({"base"} if is_plain else {"base", "base, optimised"})
            assert (e["deviation"] is None) if is_plain else 0 <= e["deviation"] <= 1e-5
            assert 0 < e["seconds"]["q1"] <= e["seconds"]["median"] <= e["seconds"]["q3"]
            assert e["memory"] > 0
        assert found["native"]["architecture"] == "seresnet18"
        assert found["base"]["ratios"]["base"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}


def test_a_report_has_the_ratios_of_the_times(monkeypatch):
    seconds = {"base": [2.0, 4.0], "injected": [3.0, 6.0], "base, optimised": [1.0, 2.0], "injected, optimised": [1.25, 2.5]}
    monkeypatch.setattr(bench, "interleaved", lambda jobs, **_: {name: seconds[name] for name in jobs})
    (comparison,) = measured("test_vit", "--no-native", *ONCE)["comparisons"]
    medians = {name: {to: r["median"] for to, r in e["ratios"].items()} for name, e in by_name(comparison).items()}
    assert medians == {
        "base": {"base": 1.0}, "base, optimised": {"base": 0.5, "base, optimised": 1.0},
        "injected": {"base": 1.5}, "injected, optimised": {"base": 0.625, "base, optimised": 1.25}}
    shown = call("bench", "test_vit", "--no-native", *ONCE)[0]
    assert re.search(r"injected, optimised +1,875 +1,562 to 2,188 +-37\.5% .* \+25\.0%", shown)
    table = call("bench", "test_vit", "--no-native", *ONCE, "--markdown")[0]
    assert "| test_vit | 1 | injected | 4,500 | 3,750 to 5,250 | +50.0% (+50.0% to +50.0%) |  |" in table


def test_an_optimisation_that_computes_something_else_is_an_error(monkeypatch):
    def wrong(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_classifier().bias += 0.1
        return other

    monkeypatch.setattr(se_inject, "optimize_for_inference", wrong, raising=False)
    out, err = call("bench", "test_resnet", "--no-native", *ONCE, code=1)
    assert "outputs differ from the plain model's" in err
    assert out == ""


def test_deviation_is_relative_to_the_largest_output():
    linear, other = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[4.0], [1.0]]))
        other.weight.copy_(torch.tensor([[4.0], [2.0]]))
    assert deviation(linear, other, torch.ones(1, 1)) == 0.25
    other.weight.data.fill_(torch.nan)
    assert not deviation(linear, other, torch.ones(1, 1)) <= 1e-5


def test_training():
    said = measured("test_resnet", "--measure", "training", "--size", 32, "--batch", 2, "--no-native", *ONCE,
                    "--dtype", "float32", "--dtype", "bfloat16")  # fmt: skip
    assert [c["dtype"] for c in said["comparisons"]] == ["float32", "bfloat16"]
    for comparison in said["comparisons"]:
        found = by_name(comparison)
        assert list(found) == ["base", "injected"]
        assert found["injected"]["memory"] > found["base"]["memory"] > 4 * found["base"]["params"]  # gradients, and more


def test_a_step_goes_backward():
    model = timm.create_model("test_resnet", num_classes=3)
    bench._step(model, torch.randn(2, 3, 32, 32), "bfloat16", None)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_surgery():
    said = measured("test_resnet", "resnet18", "--measure", "surgery", "--device", "meta", *ONCE)
    for comparison in said["comparisons"]:
        made, done = comparison["entries"]
        assert (made["name"], done["name"]) == ("create_model", "inject")
        assert set(done["parts"]) == {"record", "sites", "code", "apply"}
        assert 0 < sum(done["parts"].values()) <= done["seconds"]["median"]
        plan = se_inject.plan(comparison["model"])
        assert (done["params"], done["blocks"]) == (plan.added_params, len(plan.sites))
        assert set(done["ratios"]) == {"create_model"}
    small, large = (c["entries"][1]["nodes"] for c in said["comparisons"])
    assert 0 < small < large
    assert "inject / create_model" in call("bench", "test_vit", "--measure", "surgery", *ONCE)[0]


def test_surgery_is_as_it_was_after_it_was_watched():
    before = pipeline.record_on, pipeline.apply
    with timing.watched(se_inject.surgery, ["_record", "apply"]) as seconds:
        se_inject.inject(timm.create_model("test_resnet"))
        assert {name: len(found) for name, found in seconds.items()} == {"_record": 1, "apply": 1}
    assert (pipeline.record_on, pipeline.apply) == before


def test_loading():
    (comparison,) = measured("test_resnet", "--measure", "loading", "--ratio", 0.5, *ONCE)["comparisons"]
    found = by_name(comparison)
    assert {name: list(e["ratios"]) for name, e in found.items()} == {
        "load_file, load_state_dict": ["load_file, load_state_dict"],
        "load(model=)": ["load_file, load_state_dict"],
        "load(model=), the base's file": ["load_file, load_state_dict"],
        "load_checkpoint": ["load_file, load_state_dict"],
        "create_model(checkpoint_path)": ["create_model(checkpoint_path)"],
        "load(path)": ["create_model(checkpoint_path)"],
        "create_model(checkpoint_path), twin": ["create_model(checkpoint_path)"]}
    sizes = {e["architecture"]: set() for e in found.values()}
    for name, e in found.items():
        sizes[e["architecture"]].add(e["file"] if "the base's" not in name else found["load_file, load_state_dict"]["file"])
    more = 4 * se_inject.plan("test_resnet", ratio=0.5).added_params
    assert found["load(model=)"]["file"] - found["load_file, load_state_dict"]["file"] >= more
    assert found["load(model=), the base's file"]["file"] == found["load_file, load_state_dict"]["file"]
    assert "load(path)" in call("bench", "test_resnet", "--measure", "loading", *ONCE)[0]


def test_threads_and_log_are_as_before():
    torch.set_num_threads(1)
    call("bench", "test_resnet", "--no-native", "--rounds", 1, "--threads", 2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("args, code, message", [
    ([], 2, "one or more NAMEs"),
    (["test_resnet", "--write", "page.md"], 2, "one or more NAMEs"),
    (["resnet5O"], 2, "did you mean 'resnet50'"),
    (["resnet18", "--vs", "resnet5O"], 2, "did you mean 'resnet50'"),
    (["resnet18", "--vs", ""], 2, "no model ''"),
    (["resnet18", "--vs", "resnet50 ratio"], 2, "expected NAME=VALUE"),
    (["resnet18", "--vs", "resnet50 pretrained=True"], 2, "it names weights"),
    (["resnet18", "--vs", "resnet50 foo=1"], 2, "cannot create 'resnet50'"),
    (["resnet18", "--measure", "loading", "--vs", "resnet50"], 2, "takes no --vs"),
    (["resnet18", "--batch", "0"], 2, "--batch"),
    (["resnet18", "--ratio", "16"], 2, "write ratio=1/16"),
    (["resnet18", "--device", "nowhere"], 2, "write --device cpu"),
    (["resnet18", "--device", "meta"], 2, "a device that computes"),
    (["resnet18", "--device", "meta", "--measure", "loading"], 2, "is done on cpu"),
    (["vit_tiny_patch16_224", "--size", "32"], 2, "--model-kwargs img_size=32"),
    (["seresnet18"], 1, "already have channel attention"),
    (["--write", "none.md"], 1, "cannot read 'none.md'"),
])  # fmt: skip
def test_what_goes_wrong(args, code, message):
    out, err = call("bench", *args, code=code)
    assert message in re.sub(r"\s+", " ", err)
    assert out == ""


A_PAGE = """before

<!-- one: begin -->

```sh
se-inject bench test_resnet --no-native
```

old

<!-- one: end -->
between
<!-- two: begin -->

```sh
se-inject bench test_vit --vs 'a b=1'
```
<!-- two: end -->
after
"""


def test_a_page_keeps_what_stands_around_its_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(A_PAGE)
    asked = []
    assert bench_report.rewrite(str(page), lambda words: asked.append(words) or r"| \1 new |", ["two"]) == ["two"]
    assert asked == [["test_vit", "--vs", "a b=1"]]
    assert page.read_text() == A_PAGE.replace("```\n<!-- two: end", "```\n\n| \\1 new |\n\n<!-- two: end")
    assert bench_report.rewrite(str(page), lambda words: "new") == ["one", "two"]
    assert page.read_text().count("new") == 2
    assert "old" not in page.read_text()
    with pytest.raises(se_inject.SEInjectError, match="has no table three, but one, two"):
        bench_report.rewrite(str(page), lambda words: "new", ["three"])


def test_a_command_that_fails_leaves_its_table(tmp_path, capfd):
    page = tmp_path / "page.md"
    page.write_text(A_PAGE.replace("test_vit --vs 'a b=1'", "resnet5O"))
    before = page.read_text()
    err = call("bench", "--write", page, "--table", "two", "--rounds", 1, code=1)[1]
    assert "se-inject bench resnet5O failed" in err
    assert "did you mean 'resnet50'" in capfd.readouterr().err
    assert page.read_text() == before


def test_the_commands_of_the_page_can_be_given():
    commands = [m["command"] for m in bench_report._COMMAND.finditer(PAGE.read_text())]
    assert len(commands) == PAGE.read_text().count(": begin -->") >= 7
    shown = re.findall(r"^se-inject bench .*$", PAGE.read_text(), re.MULTILINE)
    assert set(commands) <= set(shown)
    bench_command = cli.main.commands["bench"]
    for command in shown:
        context = bench_command.make_context("bench", shlex.split(command)[2:])
        assert isinstance(context, click.Context)
        assert all(timm.is_model(name) for name in context.params["names"])
        assert all(timm.is_model(name) for name, _ in context.params["others"])

"""The variants are as named, and a report has the ratios of its times. No test asks how long anything takes."""

import copy
import json
import re

import pytest
import timm
import torch

import se_inject
from se_inject.capture.inputs import input_sizes
from se_inject.capture.values import equal
from se_inject.config import SEConfig
from se_inject.surgery.state import block_paths
from se_inject.tools import bench, timing, variants
from se_inject.tools.outputs import deviation, run
from se_inject.tools.variants import plain_variants

from ..cli.test_cli import call

ONCE = ["--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0.001)


def measured(*args):
    return json.loads(call("bench", *args, "--json")[0])


def by_name(comparison):
    return {e["name"]: e for e in comparison["entries"]}


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
        assert list(found) == [f"{name}{how}" for name in plain for how in ("", ", optimized")]
        for name, e in found.items():
            is_plain = name in plain
            assert set(e["ratios"]) == ({"base"} if is_plain else {"base", "base, optimized"})
            assert (e["deviation"] is None) if is_plain else 0 <= e["deviation"] <= 1e-5
            assert 0 < e["seconds"]["q1"] <= e["seconds"]["median"] <= e["seconds"]["q3"]
            assert e["memory"] > 0
        assert found["native"]["architecture"] == "seresnet18"
        assert found["base"]["ratios"]["base"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}


def test_a_report_has_the_ratios_of_the_times(monkeypatch):
    seconds = {"base": [2.0, 4.0], "injected": [3.0, 6.0], "base, optimized": [1.0, 2.0], "injected, optimized": [1.25, 2.5]}
    monkeypatch.setattr(bench, "interleaved", lambda jobs, **_: {name: seconds[name] for name in jobs})
    (comparison,) = measured("test_vit", "--no-native", *ONCE)["comparisons"]
    medians = {name: {to: r["median"] for to, r in e["ratios"].items()} for name, e in by_name(comparison).items()}
    assert medians == {
        "base": {"base": 1.0}, "base, optimized": {"base": 0.5, "base, optimized": 1.0},
        "injected": {"base": 1.5}, "injected, optimized": {"base": 0.625, "base, optimized": 1.25}}
    shown = call("bench", "test_vit", "--no-native", *ONCE)[0]
    assert re.search(r"injected, optimized +1,875 +1,562 to 2,188 +-37\.5% .* \+25\.0%", shown)
    table = call("bench", "test_vit", "--no-native", *ONCE, "--markdown")[0]
    assert "| test_vit | 1 | injected | 4,500 | 3,750 to 5,250 | +50.0% (+50.0% to +50.0%) |  |" in table


def test_an_optimization_that_computes_something_else_is_an_error(monkeypatch):
    def wrong(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_classifier().bias += 0.1
        return other

    monkeypatch.setattr(variants, "optimize_for_inference", wrong)
    out, err = call("bench", "test_resnet", "--no-native", *ONCE, code=1)
    assert "outputs deviate from the plain model's" in err
    assert out == ""


@pytest.mark.contract
@pytest.mark.parametrize("engine, batch", [("onnxruntime", 1), ("openvino", 2)])
def test_engines(engine, batch, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip(engine)
    command = ["test_resnet", "--no-native", "--engine", engine, "--batch", str(batch), *ONCE]
    report = measured(*command)
    (comparison,) = report["comparisons"]
    assert report["settings"]["engine"] == engine
    assert list(by_name(comparison)) == ["base", "base, optimized", "injected", "injected, optimized"]
    assert all(e["seconds"]["median"] > 0 and e["memory"] is None for e in comparison["entries"])
    assert f"float32; {engine}; 3x160x160" in call("bench", *command)[0]
    right = bench.program
    monkeypatch.setattr(bench, "program", lambda *args: lambda images: tuple(t + 0.1 for t in right(*args)(images)))
    out, err = call("bench", *command, code=1)
    assert f"the outputs of {engine} deviate from torch's" in re.sub(r"\s+", " ", err) and out == ""


@pytest.mark.parametrize("args", [
    ["--measure", "training"], ["--dtype", "bfloat16"], ["--device", "cuda"], ["--compile"], ["--channels-last"]],
    ids=lambda args: args[0])
def test_engines_run_inference_on_the_cpu(args):
    if "cuda" in args and not torch.cuda.is_available():
        pytest.skip("no CUDA: the device is refused before")
    _, err = call("bench", "test_resnet", "--engine", "openvino", *args, code=2)
    assert f"leave {' '.join(args)} out" in re.sub(r"\s+", " ", err)


@pytest.mark.contract
def test_every_variant_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(bench.torch, "compile", lambda model, compile=torch.compile, **options: compile(model, **{
        **options, "backend": lambda graph, inputs: compiled.append(len(inputs)) or graph.forward}))  # fmt: skip
    others = [arg for width in (8, 16, 24) for arg in ("--vs", f"se_inject/test_resnet se_rd_channels={width}")]
    measured("test_resnet", "--compile", "--backend", "eager", "--batch", 1, "--batch", 2, "--no-native", *others, *ONCE)
    assert len(compiled) == 10 * 2  # variants, and batches


@pytest.mark.parametrize("args, message", [
    (["--compile", "--backend", "fast"], "--backend fast: torch.compile has .*inductor"),
    (["--backend", "cudagraphs"], "give --compile, too")])  # fmt: skip
def test_backends_that_do_not_run(args, message):
    _, err = call("bench", "test_resnet", *args, code=2)
    assert re.search(message, re.sub(r"\s+", " ", err))


def test_deviation_is_relative_to_the_largest_output():
    expected = {"a": torch.tensor([4.0, -1.0]), "b": None}
    assert deviation(expected, {"a": torch.tensor([4.0, -2.0]), "b": None}) == 0.25
    assert deviation(expected, expected) == 0.0
    for output in ([torch.ones(1), torch.tensor([torch.nan])], [torch.tensor([torch.nan]), torch.ones(1)]):
        assert not deviation([torch.ones(1), torch.ones(1)], output) <= 1e-5


@pytest.mark.contract
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


@pytest.mark.contract
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


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_timed_injection_is_that_of_inject(name):
    config, seconds = SEConfig(ratio=0.5), {stage: [] for stage in ("record", "sites", "code", "apply")}
    model = timm.create_model(name).eval()
    other = se_inject.inject(copy.deepcopy(model), config)
    bench.inject_in_stages(model, config, seconds)
    assert all(len(values) == 1 for values in seconds.values())
    assert block_paths(model) == block_paths(other)
    assert {k: t.shape for k, t in model.state_dict().items()} == {k: t.shape for k, t in other.state_dict().items()}
    model.load_state_dict(other.state_dict())
    images = torch.randn(1, *input_sizes(model)[0])
    assert equal(run(model, images), run(other, images))


@pytest.mark.contract
def test_startup(monkeypatch):
    tried = ("create_model, twin", "se-inject plan")  # each takes seconds
    monkeypatch.setattr(bench, "interleaved", lambda jobs, **_: {
        name: [1 + len(job()) if name in tried else 1] for name, job in jobs.items()})
    shown = call("bench", "test_resnet", "--measure", "startup")[0]
    assert re.search(r"model +what +ms +quartiles +compared with +ratio\n", shown)
    expected = {"import se_inject, timm": "import timm", "create_model, twin": "create_model", "se-inject plan": "create_model"}
    for name, to in expected.items():
        assert re.search(f"test_resnet +{name} .* +{to} ", shown)
    assert re.search(r"se-inject plan +\d+,000 ", shown)  # it printed something


@pytest.mark.contract
def test_a_process_that_fails_is_an_error():
    _, err = call("bench", "seresnet18", "--measure", "startup", *ONCE, code=1)
    assert "python -c 'import se_inject, timm; timm.create_model('" in err.replace('"', "") and "failed: " in err


@pytest.mark.contract
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
    said = measured("test_resnet", "--measure", "surgery", "--device", "meta", "--rounds", 1, "--threads", 2)
    assert said["machine"]["threads"] == 2
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("args, code, message", [
    ([], 2, "Missing argument 'NAME...'"),
    (["resnet5O"], 2, "did you mean 'resnet50'"),
    (["resnet18", "--vs", "resnet5O"], 2, "did you mean 'resnet50'"),
    (["resnet18", "--vs", ""], 2, "no model ''"),
    (["resnet18", "--vs", "resnet50 ratio"], 2, "expected NAME=VALUE"),
    (["resnet18", "--vs", "resnet50 pretrained=True"], 2, "it names weights"),
    (["resnet18", "--vs", "resnet50 foo=1"], 2, "cannot create 'resnet50'"),
    (["resnet18", "--measure", "loading", "--vs", "resnet50"], 2, "--measure loading calls no model: leave --vs out"),
    (["resnet18", "--measure", "startup", "--batch", "2", "--no-native"], 2, "leave --batch and --no-native out"),
    (["resnet18", "--measure", "surgery", "--dtype", "bfloat16"], 2, "leave --dtype out"),
    (["resnet18", "--measure", "startup", "--ratio", "0.5"], 2, "give NAMEs alone"),
    (["resnet18", "--batch", "0"], 2, "--batch"),
    (["resnet18", "--ratio", "16"], 2, "write ratio=1/16"),
    (["resnet18", "--device", "nowhere"], 2, "write --device cpu"),
    (["resnet18", "--device", "meta"], 2, "needs a device that computes"),
    (["resnet18", "--device", "meta", "--measure", "loading"], 2, "needs cpu"),
    (["vit_tiny_patch16_224", "--size", "32"], 2, "--model-kwargs img_size=32"),
    (["seresnet18"], 1, "already have channel attention"),
])  # fmt: skip
def test_what_goes_wrong(args, code, message):
    out, err = call("bench", *args, code=code)
    assert message in re.sub(r"\s+", " ", err)
    assert out == ""

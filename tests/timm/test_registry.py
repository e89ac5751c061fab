"""timm's door: names, listing, arguments, and the errors for bad ones."""

import argparse
import dataclasses
import subprocess
import sys
import types
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _factory, _registry

import se_inject
from se_inject import block_paths
from se_inject.config import SEConfig
from se_inject.timm_names import ALIAS, PREFIX, split_options
from se_inject.timm_registry import register
from se_inject.timm_tables import TwinEntrypoints

from ..support.checks import randomise


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_name_has_its_twin():
    names = [n for n in timm.list_models() if not n.startswith(PREFIX)]
    assert len(names) > 1000
    assert {PREFIX + n for n in names} == set(timm.list_models(f"{PREFIX}*"))
    assert all(timm.is_model(PREFIX + n) and timm.is_model(ALIAS + n) for n in names)


def test_tags_are_the_bases_own():
    tags = timm.list_pretrained("resnet50")
    assert tags and timm.list_pretrained("se_inject/resnet50") == [PREFIX + t for t in tags]
    ours = timm.get_pretrained_cfg("se_inject/resnet50.a1_in1k")
    theirs = timm.get_pretrained_cfg("resnet50.a1_in1k")
    assert ours.hf_hub_id == theirs.hf_hub_id and ours.tag == theirs.tag == "a1_in1k"


def test_the_alias_is_a_full_name():
    """As tools ask for it before they load weights: segmentation_models_pytorch, for its encoder tu-se_inject_test_resnet."""
    for tag in ("", ".r160_in1k"):
        alias, twin, base = (f"{prefix}test_resnet{tag}" for prefix in (ALIAS, PREFIX, ""))
        assert timm.models.is_model_pretrained(alias) and timm.models.is_model_pretrained(twin)
        cfg, theirs = timm.models.get_pretrained_cfg(alias), timm.models.get_pretrained_cfg(base)
        assert cfg == timm.models.get_pretrained_cfg(twin) == dataclasses.replace(theirs, architecture="se_inject/test_resnet")
        assert timm.models.get_pretrained_cfg_value(alias, "mean") == theirs.mean
    assert not timm.models.is_model_pretrained(f"{ALIAS}test_resnet.r999")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.models.get_pretrained_cfg(f"{ALIAS}test_resnet.r999")
    assert timm.models.get_pretrained_cfg(f"{ALIAS}unknown") is None
    assert timm.models.model_entrypoint(f"{ALIAS}test_resnet", "se_inject") is timm.models.model_entrypoint(twin)
    assert timm.models.is_model_in_modules(f"{ALIAS}test_resnet", ["se_inject"])
    assert not timm.models.is_model_in_modules(f"{ALIAS}test_resnet", ["resnet"])


def test_aliases_are_listed_where_they_are_asked_for():
    assert timm.list_pretrained(f"{ALIAS}test_resnet") == [f"{ALIAS}test_resnet.r160_in1k"]
    assert timm.list_models(f"{ALIAS}resnet5*") == [ALIAS + n for n in timm.list_models("resnet5*")]
    assert timm.list_models([f"{ALIAS}test_resnet", "test_resnet"]) == [f"{ALIAS}test_resnet", "test_resnet"]
    assert timm.list_models(f"{ALIAS}test_*", exclude_filters=f"{ALIAS}*vit*", module="se_inject")
    assert not any(n.startswith(ALIAS) for n in (*timm.list_models(), *timm.list_models(module="se_inject")))
    assert not any(n.startswith(ALIAS) for n in timm.list_models("*test_resnet"))


def test_twins_follow_what_becomes_of_their_base(monkeypatch):
    def late_vit(pretrained=False, **kwargs):
        return timm.create_model("test_vit", **kwargs)

    module = types.ModuleType("late")
    late_vit.__module__ = "late"
    monkeypatch.setitem(sys.modules, "late", module)
    cfg = {"url": "https://a.b/c.pth"}
    try:
        for tag, other in (("a", "b"), ("b", "a")):
            module.default_cfgs = timm.models.generate_default_cfgs({f"late_vit.{tag}": cfg})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                timm.models.register_model(late_vit)
            for prefix in (PREFIX, ALIAS):
                assert timm.models.is_model_pretrained(f"{prefix}late_vit.{tag}")
                if hasattr(_registry, "_clear_model_entries"):  # older timm keeps the tags of a model that is overwritten
                    assert not timm.models.is_model_pretrained(f"{prefix}late_vit.{other}")
                    assert timm.list_pretrained(f"{prefix}late_vit") == [f"{prefix}late_vit.{tag}"]
    finally:
        for table in ("_model_entrypoints", "_model_to_module", "_model_default_cfgs", "_model_with_tags"):
            getattr(_registry, table).pop("late_vit", None)
        for tag in ("", ".a", ".b"):
            _registry._model_pretrained_cfgs.pop(f"late_vit{tag}", None)
            _registry._model_has_pretrained.discard(f"late_vit{tag}")
        _registry._module_to_models.pop("late", None)
    assert not timm.is_model("se_inject/late_vit") and "se_inject/late_vit" not in timm.list_models()


def test_a_name_registered_later_has_a_twin(monkeypatch):
    def late_resnet(pretrained=False, **kwargs):
        return timm.create_model("resnet18", **kwargs)

    module = types.ModuleType("late")
    late_resnet.__module__ = "late"
    monkeypatch.setitem(sys.modules, "late", module)
    try:
        timm.models.register_model(late_resnet)
        model = timm.create_model("se_inject/late_resnet", num_classes=3)
        assert model.num_classes == 3 and len(block_paths(model)) == 8
    finally:
        for name in ("late_resnet", "se_inject/late_resnet"):
            _registry._model_entrypoints.pop(name, None)
            _registry._model_to_module.pop(name, None)


def test_collisions_raise_and_replace_nothing():
    before = _registry._model_entrypoints["se_inject/resnet18"]
    with pytest.raises(se_inject.SEInjectError, match="belongs to se_inject"):
        _registry._model_entrypoints["se_inject/resnet18"] = lambda **kwargs: None
    assert _registry._model_entrypoints["se_inject/resnet18"] is before
    with pytest.raises(se_inject.SEInjectError, match="already has a model named 'se_inject/a'"):
        TwinEntrypoints({"a": print, "se_inject/a": print})


def test_registering_twice_changes_nothing():
    parse, table = _factory.parse_model_name, _registry._model_entrypoints
    register()
    assert _factory.parse_model_name is parse and _registry._model_entrypoints is table


def test_arguments_reach_both():
    kwargs = {"se_ratio": 0.25, "se_stages": (2, 3), "num_classes": 5, "in_chans": 1}
    given = dict(kwargs)
    model = timm.create_model("se_inject/resnet18", **kwargs)
    assert kwargs == given
    assert model.num_classes == 5 and model.conv1.in_channels == 1
    assert block_paths(model) == ["layer2.0.se", "layer2.1.se", "layer3.0.se", "layer3.1.se"]
    assert model.layer2[0].se.fc1.out_channels == 32
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_wrong_options_are_named():
    with pytest.raises(se_inject.SEInjectError, match="did you mean 'se_ratio'"):
        timm.create_model("se_inject/resnet18", se_raito=0.5)
    with pytest.raises(se_inject.SEInjectError, match="write ratio=1/16"):
        timm.create_model("se_inject/resnet18", se_ratio=16)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("se_inject/resnet1800")


@pytest.mark.parametrize("value, options", [
    ("se_ratio=0.125", {"ratio": 0.125}),
    ("se_stages=3,4", {"stages": (3, 4)}),
    ("se_stages=[3,4]", {"stages": (3, 4)}),
    ("se_stages=3", {"stages": (3,)}),
    ("se_include=layer3*", {"include": ("layer3*",)}),
    ("se_include=['layer3*','*.1.*']", {"include": ("layer3*", "*.1.*")}),
    ("se_bias=False", {"bias": False}),
    ("se_block=eca", {"block": "eca"}),
    ("se_ratio=1/8", "write a number, such as 0.125"),
    ("se_bias=no", "expected True or False"),
    ("se_stages=last", "expected int or a sequence of int"),
    ("se_include=layer3*,layer4*", r"write include=\['layer3\*', 'layer4\*'\]"),
])  # fmt: skip
def test_options_as_timms_scripts_read_them(value, options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", action=timm.utils.ParseKwargs)
    try:
        given = parser.parse_args(["--model-kwargs", value]).model_kwargs
    except SyntaxError:  # older timm
        pytest.skip("this timm's scripts take no such word")
    if isinstance(options, str):
        with pytest.raises(se_inject.SEInjectError, match=options):
            split_options(given)
    else:
        assert split_options(given) == ((se_inject.SEConfig(**options),), {})


def test_twin_is_the_model_that_inject_makes():
    torch.manual_seed(1)
    a = timm.create_model("se_inject/convnext_atto")
    torch.manual_seed(1)
    b = se_inject.inject(timm.create_model("convnext_atto"))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert a.pretrained_cfg["architecture"] == "se_inject/convnext_atto"


def test_the_model_keeps_timms_interface():
    model = timm.create_model("se_inject/resnet18").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert isinstance(model, timm.models.ResNet) and model.feature_info[-1]["module"] == "layer4"


def test_features_only():
    model = timm.create_model("se_inject/resnet18", features_only=True, out_indices=(1, 3))
    assert [tuple(f.shape) for f in model(torch.randn(1, 3, 64, 64))] == [(1, 64, 16, 16), (1, 256, 4, 4)]
    assert any(".se." in k for k in model.state_dict())


@pytest.mark.parametrize("name, options", [
    ("resnet18", {"feature_cls": "hook"}), ("tf_efficientnet_lite0", {}), ("vgg11", {"mlp_ratio": 0.02}),
    ("hrnet_w18_small", {}), ("vit_tiny_patch16_224", {})])  # fmt: skip
def test_every_feature_wrapper(name, options):
    ours = timm.create_model(f"se_inject/{name}", features_only=True, **options).eval()
    theirs = timm.create_model(name, features_only=True, **options).eval()
    state = ours.state_dict()
    theirs.load_state_dict({k: state[k] for k in theirs.state_dict()})
    assert len(state) > len(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))


# the first line is asked before any listing
MADE = ("; print(timm.models.is_model_pretrained('se_inject_test_resnet'), end=' ')"
        "; m = timm.create_model('se_inject_test_resnet'); print(type(m).__name__, 'layer1.0.se.fc1.weight' in m.state_dict())")


def test_importing_after_timm_registers_and_costs_little():
    """Imports are counted, not timed: only this package and wrapt come on top of timm."""
    out = run("import sys, timm, torch; before = set(sys.modules); import se_inject;"
              f"print(*sorted({{m.partition('.')[0] for m in set(sys.modules) - before}})){MADE}")
    imports, made = out.splitlines()
    assert set(imports.split()) <= {"se_inject", "wrapt", "__future__"} | set(sys.stdlib_module_names)
    assert made == "True ResNet True"


def test_importing_before_timm_registers_and_imports_no_torch():
    assert run(f"import sys, se_inject; print('torch' in sys.modules); import timm{MADE}") == "False\nTrue ResNet True"


def test_config_is_checked():
    with pytest.raises(se_inject.SEInjectError, match="did you mean 'auto'"):
        SEConfig(placement="atuo")
    with pytest.raises(se_inject.SEInjectError, match="give one"):
        SEConfig(ratio=0.5, rd_channels=8)
    with pytest.raises(se_inject.SEInjectError, match=r"did you mean 'rd_channels'"):
        SEConfig.of(rd_chanels=4)
    config = SEConfig(ratio=0.5, stages=[1, 2])
    assert SEConfig.of(config.to_dict()) == config and config.stages == (1, 2)


def test_blocks_that_replace_attention_do_not_get_its_weights(tmp_path):
    base = randomise(timm.create_model("seresnet18")).eval()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = timm.create_model("se_inject/seresnet18", pretrained=True, se_existing="replace", pretrained_cfg_overlay={
        "file": str(tmp_path / "base.safetensors")}).eval()
    expected, x = se_inject.inject(base, existing="replace"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


class Towers(torch.nn.Module):
    """Two models of timm in one."""

    def __init__(self, **kwargs):
        super().__init__()
        self.a, self.b = (timm.create_model("test_resnet", num_classes=5, **kwargs) for _ in range(2))

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("pretrained", [False, True])
def test_every_part_of_a_model_gets_blocks_whichever_loads_weights_first(tmp_path, monkeypatch, pretrained):
    base = randomise(timm.create_model("test_resnet", num_classes=5)).eval()
    save_file(base.state_dict(), tmp_path / "base.safetensors")

    def towers(pretrained=False, **kwargs):
        file = {"pretrained_cfg_overlay": {"file": str(tmp_path / "base.safetensors"), "num_classes": 5}}
        return Towers(pretrained=pretrained, **file)

    monkeypatch.setitem(_registry._model_entrypoints, "towers", towers)
    model, x = timm.create_model("se_inject/towers", pretrained=pretrained).eval(), torch.randn(1, 3, 64, 64)
    assert {path.partition(".")[0] for path in block_paths(model)} == {"a", "b"}
    if pretrained:
        with torch.no_grad():
            assert torch.equal(model(x), base(x) + base(x))


@pytest.mark.parametrize("wrapper", [{}, {"out_indices": (1, 2)}])
def test_features_know_their_blocks_with_pretrained_weights_too(tmp_path, wrapper):
    save_file(randomise(timm.create_model("test_resnet")).state_dict(), tmp_path / "base.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "base.safetensors")}}
    made = [timm.create_model("se_inject/test_resnet", features_only=True, pretrained=pretrained, **wrapper, **overlay)
            for pretrained in (True, False)]
    x, paths = torch.randn(1, 3, 64, 64), [block_paths(model) for model in made]
    assert paths[0] == paths[1] and paths[0]
    model, other = made
    se_inject.save(model, tmp_path / "m.safetensors")
    se_inject.load(tmp_path / "m.safetensors", model=other)
    assert all(map(torch.equal, model.eval()(x), other.eval()(x)))
    assert not model.load_state_dict({k: v for k, v in model.state_dict().items() if ".se." in k}).missing_keys
    assert len(se_inject.gates(model, [x]).sites) == len(paths[0])
    se_inject.eject(model)
    assert not block_paths(model)

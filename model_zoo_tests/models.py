"""The table: timm models, the size they run at here, and the chains that must be found in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One row.

    Attributes:
        name: timm's name.
        size: height and width of the inputs used here.
        fused: number of chains by fused class.
        traceable: whether torch.fx can trace it, so that the oracle confirms the chains name by name.
        options: further arguments of ``timm.create_model``.
    """

    name: str
    size: int
    fused: Mapping[str, int]
    traceable: bool = True
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


ZOO = (
    ZooModel("resnet18", 64, {"ConvBnReLU2d": 9, "ConvBn2d": 11}),
    ZooModel("resnet26d", 32, {"ConvBnReLU2d": 19, "ConvBn2d": 12}),
    ZooModel("seresnet18", 32, {"ConvBnReLU2d": 9, "ConvBn2d": 11, "ConvReLU2d": 8, "ConvAct2d": 8}),
    ZooModel("mobilenetv2_050", 32, {"ConvBnAct2d": 35, "ConvBn2d": 17}),
    ZooModel(
        "mobilenetv3_small_050", 32, {"ConvBnAct2d": 18, "ConvBnReLU2d": 5, "ConvReLU2d": 9, "ConvAct2d": 10, "ConvBn2d": 11}
    ),
    ZooModel("tf_efficientnet_b0", 32, {"ConvBnAct2d": 33, "ConvAct2d": 32, "ConvBn2d": 16}),
    ZooModel("mixnet_s", 32, {"ConvBnReLU2d": 5, "ConvBn2d": 3, "ConvBnAct2d": 7, "ConvAct2d": 26, "BNReLU2d": 2}),
    ZooModel("densenet121", 32, {"ConvBnReLU2d": 59, "BNReLU2d": 62}),
    ZooModel("regnety_002", 32, {"ConvBnReLU2d": 27, "ConvReLU2d": 13, "ConvAct2d": 13, "ConvBn2d": 17}),
    ZooModel("repvgg_a0", 32, {"ConvBn2d": 44}),
    ZooModel("ghostnet_100", 32, {"ConvBnReLU2d": 34, "ConvBn2d": 46, "ConvReLU2d": 8, "ConvAct2d": 7}),
    ZooModel("hrnet_w18_small", 32, {"ConvBnReLU2d": 43, "ConvBn2d": 48}),
    ZooModel("dla34", 32, {"ConvBnReLU2d": 21, "ConvBn2d": 16}),
    ZooModel("res2net50_26w_4s", 32, {"ConvBnReLU2d": 65, "ConvBn2d": 20}),
    ZooModel("levit_128s", 224, {"ConvBnAct2d": 3, "ConvBn2d": 1}),
    ZooModel("convnext_atto", 32, {"ConvAct2d": 12}),
    ZooModel("vit_tiny_patch16_224", 64, {"LinearAct": 12}, options={"img_size": 64}),
    ZooModel("vgg11_bn", 64, {"ConvBnReLU2d": 8, "ConvReLU2d": 2}, traceable=False),
    ZooModel("inception_v3", 96, {"ConvBnReLU2d": 94}),
    ZooModel("efficientvit_b0", 32, {"ConvBnAct2d": 11, "ConvBn2d": 15, "ConvAct2d": 12}, traceable=False),
    ZooModel("selecsls42", 64, {"ConvBnReLU2d": 41}),
)

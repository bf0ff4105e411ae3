"""Networks, dynamic and plain."""

from dfs.models.cifar_resnet import (
    DynamicOutput,
    DynamicResNet,
    PlainResNet,
    build_model,
    resnet_depth,
)

__all__ = ["DynamicOutput", "DynamicResNet", "PlainResNet", "build_model", "resnet_depth"]

"""Models by name. An own one is named `package.module:Class`; it is an `nn.Module` with `model(input) -> output`."""

MODELS = {
    "cnn": "toolkit.models.cnn:Cnn",
    "gpt": "toolkit.models.gpt:Gpt",
    "mlp": "toolkit.models.mlp:Mlp",
    "resnet": "toolkit.models.resnet:ResNet",
    "vit": "toolkit.models.vit:Vit",
}

"""Parameter shapes of the models that are timed, in the order of torchvision's `parameters()`."""


def resnet50() -> list[tuple[int, ...]]:
    """He et al. 2015, table 1, with torchvision's layout: (outputs, inputs, height, width)."""

    def convolution(outputs, inputs, size):  # and the scale and shift of its batch normalisation
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes, inputs = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3)
            shapes += convolution(outputs, width, 1)
            if block == 0:  # the shortcut's projection
                shapes += convolution(outputs, inputs, 1)
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def vit_b_16() -> list[tuple[int, ...]]:
    """Dosovitskiy et al. 2020, ViT-Base with patches of 16 x 16 in images of 224 x 224."""
    width, patches = 768, 14 * 14

    def linear(outputs, inputs):
        return [(outputs, inputs), (outputs,)]

    norm = [(width,), (width,)]
    layer = [*norm, *linear(3 * width, width), *linear(width, width)]
    layer += [*norm, *linear(4 * width, width), *linear(width, 4 * width)]
    first = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 1 + patches, width)]
    return [*first, *(12 * layer), *norm, *linear(1000, width)]

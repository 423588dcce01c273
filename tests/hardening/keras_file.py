"""Makes keras.onnx beside it, by Keras's own exporter: `pip install keras`, and run this."""

import os
from pathlib import Path
from typing import Any

from blobs import blobs


def by_keras(path: Path, size: int = 16) -> Path:
    """A network that wants 0 to 255 in NHWC and gives probabilities, as in Keras's examples."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    images, layers = blobs(512, size=size), keras.layers
    x = entry = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 255)(x)
    for channels in (8, 16):
        x = layers.Conv2D(channels, 3, padding="same")(x)
        x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Dense(10, activation="softmax")(layers.Flatten()(x))
    model: Any = keras.Model(entry, x)
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    model.fit(images.image.numpy().astype("float32"), images.label.numpy(), 64, 12, verbose=0)
    model.export(path, format="onnx", opset_version=17, verbose=False)
    return path


if __name__ == "__main__":
    print(by_keras(Path(__file__).with_name("keras.onnx")))

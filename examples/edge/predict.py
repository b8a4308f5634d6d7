"""Classifies images on a device with ONNX Runtime, NumPy and Pillow alone, by the files that `export` has written.

python predict.py bank.onnx IMAGE …                  finds the task of each image by bank_router.safetensors
python predict.py bank.onnx --task signs IMAGE …     uses one task, that of bank.signs.safetensors
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

KINDS = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64, "U8": np.uint8}


def read(path):
    """The tensors of a safetensors file by name, and what it says of them."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    told = json.loads(header.pop("__metadata__")["recast_pl"])
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(content[begin:end], KINDS[entry["dtype"]]).reshape(entry["shape"])
    return tensors, told


def load_image(path, size):
    """An image (1, 3, height, width) in [0, 1], as the graph's metadata asks."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = ImageOps.fit(image.convert("RGB"), (size["width"], size["height"]), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def find_task(session, router, told, image, head):
    """The likeliest task of an image and its probability, by features of the network that all tasks start from."""
    start = {name: router[name] for name in ("numbers", "indices") if name in router}
    (features,) = session.run(["features"], {**head, **start, "images": image})
    scores = ((features - router["centre"]) @ router["weight"].T + router["bias"])[0]
    tasks = np.bincount(router["task_of"], softmax(scores / told["temperature"]))
    return told["tasks"][tasks.argmax()], tasks.max()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--task")
    options = parser.parse_args()
    session, stem = onnxruntime.InferenceSession(options.bank), options.bank.stem
    preprocessing = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    files = options.bank.parent.glob(f"{stem}.*.safetensors")
    tasks = {told["task"]: (inputs, told["classes"]) for inputs, told in map(read, files)}
    router = None if options.task else read(options.bank.with_name(f"{stem}_router.safetensors"))
    for path in options.images:
        image, task, certainty = load_image(path, preprocessing["resize"]), options.task, 1
        if router:
            task, certainty = find_task(session, *router, image, next(iter(tasks.values()))[0])
        inputs, classes = tasks[task]
        (logits,) = session.run(["logits"], {**inputs, "images": image})
        found = softmax(logits[0])
        print(f"{path}: {task} ({certainty:.1%}), {classes[found.argmax()]} ({found.max():.1%})")


if __name__ == "__main__":
    main()

"""A plain script that scores a folder of images: transformers' model and image processor in a loop; no raydet.

python benchmarks/plain_predict.py MODEL IMAGES OUT.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

BATCH_SIZE = 16


def main() -> None:
    """Write a line of JSON for each image."""
    folder, images, out = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoImageProcessor.from_pretrained(folder)
    model: Any = AutoModelForObjectDetection.from_pretrained(folder).to(device).eval()
    paths = sorted(Path(images).iterdir())
    with Path(out).open("w") as lines, torch.inference_mode():
        for start in range(0, len(paths), BATCH_SIZE):
            batch = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH_SIZE]]
            outputs = model(**processor(batch, return_tensors="pt").to(device))
            sizes_hw = [(image.height, image.width) for image in batch]
            found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes_hw)
            for path, item in zip(paths[start:], found, strict=False):
                content = {name: values.tolist() for name, values in item.items()}
                lines.write(json.dumps({"path": path.name, **content}) + "\n")


if __name__ == "__main__":
    main()
